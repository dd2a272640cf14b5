// Draws a state into the page. Handles, which have the focus, stay the same elements; all else is drawn afresh.

"use strict";

const UNIT = 100; // of the plane's coordinates, per unit of a key
const QUERY = "?"; // its name
const RIM = 292; // where the names of clusters stand

function element(name, attributes = {}, ...children) {
    return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
    return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
    node.append(...children);
    return node;
}

// Black or white, whichever can be read on a colour.
function inkOn(colour) {
    return colour === "#0072B2" ? "#fff" : "#111";
}

function paint(colour) {
    return colour ? `fill: ${colour}` : null;
}

function painted(colour) {
    return colour ? `stroke: ${colour}; fill: ${colour}` : null;
}

function directionOf([x, y]) {
    return Math.round((Math.atan2(y, x) * 180) / Math.PI);
}

// ---- The plane of keys ---------------------------------------------------------------------------------------------

function drawPlane(plane, state, query) {
    const behind = [1, 2].map((radius) => svg("circle", { class: "ring", r: radius * UNIT }));
    state.keys.forEach((key, token) => {
        const { colour, tokens } = state.entries[state.labels[token]];
        behind.push(arrow(key, tokens.length > 1 ? "member" : "key", painted(colour)));
    });
    const shared = state.entries.filter(({ tokens }) => tokens.length > 1);
    for (const { centroid, colour } of shared) behind.push(arrow(centroid, "centroid", painted(colour)));
    for (const { entries, round } of state.parts) if (round) behind.push(...partnersOf(round, entries));
    behind.push(arrow(query, "query"));
    spread(shared.map(({ centroid }) => Math.atan2(centroid[1], centroid[0]))).forEach((angle, i) => {
        const { name, tokens, colour } = shared[i];
        const [x, y] = [RIM * Math.cos(angle), -RIM * Math.sin(angle)];
        const box = { class: "name", x: x - 27, y: y - 18, width: 54, height: 36, rx: 10, style: paint(colour) };
        behind.push(svg("rect", box));
        behind.push(svg("text", { x, y, style: `fill: ${inkOn(colour)}` }, `${name}×${tokens.length}`));
    });
    plane.querySelector(".behind").replaceChildren(...behind);
    const handles = [...plane.querySelectorAll(".handle")];
    state.keys.forEach((key, token) => placeHandle(handles[token], key, state.entries[state.labels[token]]));
    placeHandle(handles.at(-1), query, { name: QUERY });
}

// Lines from the tip of each source to that of its match.
function partnersOf({ matches, nMerged }, entries) {
    return matches.map(({ source, destination }, rank) => {
        const [[x1, y1], [x2, y2]] = [entries[source].centroid, entries[destination].centroid];
        const ends = { x1: x1 * UNIT, y1: -y1 * UNIT, x2: x2 * UNIT, y2: -y2 * UNIT };
        return svg("line", { class: `partner ${rank < nMerged ? "joins" : "cut"}`, ...ends });
    });
}

function arrow([x, y], kind, style = null) {
    const [endX, endY] = [x * UNIT, -y * UNIT];
    const length = Math.hypot(endX, endY) || 1;
    const [alongX, alongY] = [endX / length, endY / length];
    const width = kind === "centroid" ? 15 : 9;
    const tail = 2 * width;
    const [backX, backY] = [endX - tail * alongX, endY - tail * alongY];
    const [left, right] = [-1, 1].map((side) => [backX + side * width * alongY, backY - side * width * alongX]);
    return svg(
        "g",
        { class: `arrow ${kind}`, style },
        svg("line", { x2: length > tail ? backX : 0, y2: length > tail ? backY : 0 }),
        svg("polygon", { points: [[endX, endY], left, right].join(" ") }),
    );
}

// Angles moved apart until names beside one another do not touch.
function spread(angles) {
    const least = 0.2;
    const order = angles.map((_, i) => i).sort((one, other) => angles[one] - angles[other]);
    const result = [...angles];
    for (let turn = 0; turn < 60; turn++) {
        order.forEach((i, place) => {
            const next = order[(place + 1) % order.length];
            const gap = result[next] - result[i] + (place + 1 === order.length ? 2 * Math.PI : 0);
            if (i !== next && gap < least) {
                result[i] -= (least - gap) / 2;
                result[next] += (least - gap) / 2;
            }
        });
    }
    return result;
}

function makeHandles(plane, nKeys) {
    const handles = Array.from({ length: nKeys + 1 }, (_, i) => {
        const isQuery = i === nKeys;
        const attributes = {
            class: isQuery ? "handle of-query" : "handle",
            tabindex: 0,
            role: "slider",
            "aria-label": isQuery ? "Query" : `Key of token ${i}`,
            "aria-valuemin": -180,
            "aria-valuemax": 180,
            "data-index": i,
        };
        const circles = [svg("circle", { class: "touch", r: 30 }), svg("circle", { class: "tip", r: 17 })];
        return svg("g", attributes, ...circles, svg("text"));
    });
    plane.replaceChildren(svg("g", { class: "behind" }), ...handles);
}

function placeHandle(handle, [x, y], { name, colour }) {
    handle.setAttribute("transform", `translate(${x * UNIT} ${-y * UNIT})`);
    handle.setAttribute("data-x", x);
    handle.setAttribute("data-y", y);
    handle.setAttribute("aria-valuenow", directionOf([x, y]));
    const said = `${directionOf([x, y])} degrees, length ${Math.hypot(x, y).toFixed(2)}`;
    handle.setAttribute("aria-valuetext", name === QUERY ? said : `${said}, entry ${name}`);
    handle.querySelector(".tip").setAttribute("style", colour ? `fill: ${colour}` : "");
    handle.querySelector("text").textContent = name;
    handle.querySelector("text").setAttribute("style", colour ? `fill: ${inkOn(colour)}` : "");
}

// ---- Entries in their order: circles look for squares --------------------------------------------------------------

const STEP = 50; // from one circle to the next

function drawChunks(place, state) {
    const nWhole = state.parts.filter((part) => !part.isRest).length;
    const chunks = state.parts.map((part, i) => {
        const title = part.isRest ? "The rest" : nWhole > 1 ? `Chunk ${i + 1}` : "";
        return element("div", { class: "chunk" }, element("h3", {}, title), chunkPicture(part), ranking(part));
    });
    place.replaceChildren(...chunks);
}

// Even entries above, odd ones below, each half a step further to the right.
function chunkPicture({ entries, round }) {
    const [top, bottom] = [58, round ? 168 : 108];
    const width = ((entries.length + 1) * STEP) / 2 + 34;
    const isDense = entries.length > 12;
    const spots = entries.map((_, entry) => [42 + (entry * STEP) / 2, entry % 2 ? bottom : top]);
    const lines = round ? linesOf(round, spots, entries.length <= 8) : [];
    const tiles = entries.map((entry, i) => tile(entry, spots[i], round && i % 2 === 0, i % 2 === 1));
    const attributes = {
        class: isDense ? "dense" : null,
        viewBox: `0 0 ${width} ${bottom + 56}`,
        style: `max-width: ${1.3 * width}px`,
        role: "img",
        "aria-label": round ? "Circles look for squares; a table follows" : `${entries.length} entries in their order`,
    };
    return svg("svg", attributes, ...lines, ...tiles);
}

function linesOf({ matches, nMerged }, spots, hasRoom) {
    const line = (kind, [x1, y1], [x2, y2]) => svg("line", { class: kind, x1, y1, x2, y2 });
    const lines = matches.flatMap((match, rank) => [
        ...tiedWith(match).map((other) => line("tied", spots[match.source], spots[other])),
        line(rank < nMerged ? "joins" : "cut", spots[match.source], spots[match.destination]),
    ]);
    const numbers = matches.map(({ source, similarity }) => {
        const [x, y] = spots[source];
        return svg("text", { class: "similarity", x, y: y + 36 }, withDigits(similarity, 3));
    });
    return hasRoom ? [...lines, ...numbers] : lines;
}

// An entry as a box, or as a circle where it looks for another, with its key in it and its name outside.
function tile({ name, tokens, centroid, colour }, [x, y], isCircle, isBelow) {
    const half = 19;
    const length = Math.hypot(...centroid) || 1;
    const [alongX, alongY] = [(13 * centroid[0]) / length, (-13 * centroid[1]) / length];
    const [leftX, leftY] = [alongX * 0.3 - alongY * 0.35, alongY * 0.3 + alongX * 0.35];
    const [rightX, rightY] = [alongX * 0.3 + alongY * 0.35, alongY * 0.3 - alongX * 0.35];
    const head = `M${leftX} ${leftY}L${alongX} ${alongY}L${rightX} ${rightY}`;
    const path = `M${-alongX} ${-alongY}L${alongX} ${alongY}${head}`; // of a zero key, a point
    const box = { x: -half, y: -half, width: 2 * half, height: 2 * half, rx: isCircle ? half : 7 };
    return svg(
        "g",
        { class: `tile${colour ? "" : " plain"}`, transform: `translate(${x} ${y})` },
        svg("rect", { ...box, style: paint(colour) }),
        svg("path", { d: path, style: colour ? `stroke: ${inkOn(colour)}` : null }),
        svg("text", { y: isBelow ? 34 : -32 }, tokens.length > 1 ? `${name}×${tokens.length}` : name),
    );
}

// Matches from the best to the worst, with the cut.
function ranking({ entries, round }) {
    if (!round) return "";
    const rows = round.matches.map((match, rank) => {
        const joins = rank < round.nMerged;
        const isTied = tiedWith(match).length > 0 || isTiedAtCut(round, match);
        const cells = [
            element("td", {}, badge(entries[match.source], true), " → ", badge(entries[match.destination])),
            element("td", { title: match.similarity }, withDigits(match.similarity, 4)),
            element("td", {}, joins ? "joins" : "is cut", isTied ? element("span", { class: "tie" }, "tie") : ""),
        ];
        return element("tr", { class: joins ? "joins" : "cut" }, ...cells);
    });
    return table(["best first", "similarity", ""], rows);
}

function table(head, rows) {
    const names = head.map((text) => element("th", {}, text));
    return element("table", {}, element("thead", {}, element("tr", {}, ...names)), element("tbody", {}, ...rows));
}

function badge({ name, colour }, isCircle = false) {
    const style = colour ? `background: ${colour}; color: ${inkOn(colour)}` : null;
    return element("b", { class: `badge${isCircle ? " circle" : ""}`, style }, name);
}

function withDigits(number, digits) {
    return number.toFixed(digits).replace("-", "−");
}

// ---- Labels, counts, centroids, attention --------------------------------------------------------------------------

function drawTokens(place, { labels, entries, chunkSize, parts }) {
    const inChunks = parts.filter((part) => !part.isRest).length * chunkSize;
    place.replaceChildren(
        ...labels.map((label, token) => {
            const { colour, name } = entries[label];
            const style = colour ? `background: ${colour}; color: ${inkOn(colour)}` : null;
            const begins = token > 0 && token <= inChunks && token % chunkSize === 0;
            const said = `token ${token}: entry ${name}, label ${label}`;
            return element(
                "li",
                { class: begins ? "begins" : null, "data-label": label, title: said },
                element("small", {}, String(token)),
                element("b", { style }, name),
            );
        }),
    );
}

function drawEntries(place, { entries }) {
    const head = ["entry", "label", "count", "tokens", "centroid"];
    const rows = entries.map((entry) => {
        const [x, y] = entry.centroid;
        const point = `${withDigits(x, 2)}, ${withDigits(y, 2)}`;
        const cells = [badge(entry), entry.label, `×${entry.tokens.length}`, entry.tokens.join(" "), point];
        const data = { "data-count": entry.tokens.length, "data-x": x, "data-y": y };
        return element("tr", data, ...cells.map((cell) => element("td", {}, cell)));
    });
    place.replaceChildren(table(head, rows));
}

function drawBars(place, errors, state, query) {
    const { ofTokens, ofEntries, withoutCounts } = sharesOf(state, query);
    const { entries } = state;
    const tokens = entries.flatMap((entry) => entry.tokens.map((token) => segment(entry, ofTokens[token])));
    const right = entries.map((entry) => entry.tokens.reduce((sum, token) => sum + ofTokens[token], 0));
    const bars = {
        [`all ${ofTokens.length} tokens`]: tokens,
        [`${entries.length} entries, with log counts`]: entries.map((entry, i) => segment(entry, ofEntries[i])),
        [`${entries.length} entries, without`]: entries.map((entry, i) => segment(entry, withoutCounts[i])),
    };
    const ends = right.map((_, i) => right.slice(0, i + 1).reduce((one, other) => one + other)).slice(0, -1);
    const edges = () => ends.map((end) => element("i", { style: `left: ${100 * end}%` }));
    const drawn = Object.entries(bars).map(([title, segments]) =>
        element("div", { class: "bar" }, element("span", {}, title), element("div", {}, ...segments, ...edges())),
    );
    place.replaceChildren(...drawn);
    const furthest = (shares) => Math.max(...shares.map((share, i) => Math.abs(share - right[i])));
    const [withLog, without] = [furthest(ofEntries), furthest(withoutCounts)];
    errors.replaceChildren(
        "Furthest from the share of its tokens: with log counts ",
        element("b", { "data-share": withLog }, points(withLog)),
        ", without ",
        element("b", { "data-share": without }, points(without)),
        " of all attention.",
    );
}

function points(share) {
    return `${(100 * share).toFixed(1)}\u00a0%`;
}

function segment({ colour, name }, share) {
    const style = `width: ${100 * share}%${colour ? `; background: ${colour}; color: ${inkOn(colour)}` : ""}`;
    return element("b", { style, title: `${name}: ${points(share)}`, "data-share": share }, share > 0.04 ? name : "");
}
