// The page's controls: settings, steps, dragging, keys of the keyboard, and test vectors.

"use strict";

// Keys by their directions in degrees and their lengths, or as points.
const EXAMPLES = {
    "Three directions": {
        keys: polar([20, 30, 25, 28, 100, 110, 105, 190], [2.6, 2.1, 1.7, 1.2, 2.4, 1.9, 1.4, 2]),
        query: [0.3, 1.1],
        chunkSize: 8,
        keepRatio: 0.375,
    },
    Ties: {
        keys: [[1, 0], [1.5, 0], [0, 1], [2, 0], [0, 1.5], [0, 2], [1, 1], [-1.5, 1.5]],
        query: [0.9, 0.6],
        chunkSize: 8,
        keepRatio: 0.75,
    },
    "Not alike at all": {
        keys: polar([0, 45, 90, 135, 180, 225, 270, 315], [2]),
        query: [0.8, 0.8],
        chunkSize: 8,
        keepRatio: 0.5,
    },
    "Two chunks and a rest": {
        keys: polar(
            [10, 18, 40, 30, 95, 88, 70, 120, 150, 160, 210, 200, 175, 190, 230, 245, 300, 310],
            [2.6, 2.1, 1.6],
        ),
        query: [0.4, 0.9],
        chunkSize: 8,
        keepRatio: 0.375,
    },
    "32 keys": {
        keys: polar(alone(32).map((i) => 11 * i + 18 * ((i * 7) % 5)), [2.6, 1.6, 2.2, 1.3, 2.4]),
        query: [0.6, 0.6],
        chunkSize: 32,
        keepRatio: 0.25,
    },
};
const FURTHEST = 2.8; // so that tips stay in the plane
const at = (id) => document.getElementById(id);
const plane = at("plane");
const now = { keys: [], query: [0, 0], chunkSize: 8, keepRatio: 0.375, step: 0 };

// Points from directions in degrees and lengths, which are repeated; float32, as keys are.
function polar(degrees, lengths) {
    return degrees.map((degree, i) => {
        const [angle, length] = [(degree * Math.PI) / 180, lengths[i % lengths.length]];
        return [Math.fround(length * Math.cos(angle)), Math.fround(length * Math.sin(angle))];
    });
}

function draw() {
    const state = stateOf(now.keys, now.chunkSize, now.keepRatio, now.step);
    now.step = state.step;
    if (plane.querySelectorAll(".handle").length !== now.keys.length + 1) makeHandles(plane, now.keys.length);
    drawPlane(plane, state, now.query);
    drawChunks(at("chunks"), state);
    drawTokens(at("tokens"), state);
    drawEntries(at("entries"), state);
    drawBars(at("bars"), at("errors"), state, now.query);
    const { title, sentences } = storyOf(state);
    if (at("story").textContent !== sentences.join("")) {
        at("story").replaceChildren(...sentences.map((text) => element("p", {}, text)));
    }
    at("step-title").textContent = title;
    at("where").textContent = state.nSteps ? `${state.step} / ${state.nSteps}` : "";
    at("restart").disabled = at("back").disabled = state.step === 0;
    at("next").disabled = at("end").disabled = state.step === state.nSteps;
    document.body.dataset.step = state.step;
    const shown = { "n-keys": now.keys.length, "chunk-size": now.chunkSize, "keep-ratio": now.keepRatio };
    for (const [id, value] of Object.entries(shown)) {
        at(id).value = value;
        at(`${id}-shown`).textContent = id === "keep-ratio" ? `${value}: ${state.target}/${now.chunkSize}` : value;
    }
}

// ---- Settings and steps --------------------------------------------------------------------------------------------

function show(name) {
    const { keys, query, ...rest } = EXAMPLES[name];
    const rounded = (point) => point.map(Math.fround);
    Object.assign(now, rest, { keys: keys.map(rounded), query: rounded(query), step: 0 });
    draw();
}

// Neighbours are alike, now and then there is a jump: as the keys of a text are.
function randomKeys(n) {
    let degree = 360 * Math.random();
    const degrees = alone(n).map(() => {
        degree += Math.random() < 0.2 ? 360 * Math.random() : 50 * Math.random() - 25;
        return degree;
    });
    return polar(degrees, alone(n).map(() => 1.1 + 1.6 * Math.random()));
}

function onSetting(id, change) {
    at(id).addEventListener("input", (event) => {
        change(Number(event.target.value));
        now.step = 0;
        draw();
    });
}

function goTo(step) {
    now.step = Math.max(0, step);
    draw();
}

for (const name of Object.keys(EXAMPLES)) at("example").append(element("option", {}, name));
at("example").addEventListener("change", (event) => show(event.target.value));
onSetting("n-keys", (n) => (now.keys = [...now.keys, ...randomKeys(n)].slice(0, n)));
onSetting("chunk-size", (size) => (now.chunkSize = size));
onSetting("keep-ratio", (ratio) => (now.keepRatio = ratio));
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("random").addEventListener("click", () => {
    now.keys = randomKeys(now.keys.length);
    goTo(0);
});
at("restart").addEventListener("click", () => goTo(0));
at("back").addEventListener("click", () => goTo(now.step - 1));
at("next").addEventListener("click", () => goTo(now.step + 1));
at("end").addEventListener("click", () => goTo(Infinity));

// ---- Arrows: dragged, or moved by the keyboard ---------------------------------------------------------------------

// A key moves to the point that is nearest to [x, y] in the plane, in float32.
function move(index, [x, y]) {
    const shrink = Math.min(1, FURTHEST / (Math.hypot(x, y) || 1));
    const point = [Math.fround(x * shrink), Math.fround(y * shrink)];
    if (index === now.keys.length) now.query = point;
    else now.keys[index] = point;
    draw();
}

function pointUnder(event) {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(plane.getScreenCTM().inverse());
    return [x / UNIT, -y / UNIT];
}

const pointOf = (index) => (index === now.keys.length ? now.query : now.keys[index]);

// Where handles lie on one another, the nearest tip is meant.
plane.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.target.closest(".handle")) return;
    const [x, y] = pointUnder(event);
    const distances = [...now.keys, now.query].map((point) => Math.hypot(point[0] - x, point[1] - y));
    const index = distances.indexOf(Math.min(...distances));
    const handle = plane.querySelector(`[data-index="${index}"]`);
    const follow = (later) => move(index, pointUnder(later));
    event.preventDefault();
    handle.focus({ preventScroll: true });
    plane.setPointerCapture(event.pointerId);
    plane.addEventListener("pointermove", follow);
    const leave = () => {
        plane.removeEventListener("pointermove", follow);
        for (const name of ["pointerup", "pointercancel"]) plane.removeEventListener(name, leave);
    };
    for (const name of ["pointerup", "pointercancel"]) plane.addEventListener(name, leave);
});

plane.addEventListener("keydown", (event) => {
    const handle = event.target.closest(".handle");
    if (!handle || !event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const index = Number(handle.dataset.index);
    const [x, y] = pointOf(index);
    const [turn, stretch] = event.shiftKey ? [1, 1.02] : [5, 1.1];
    const angle = ({ ArrowLeft: turn, ArrowRight: -turn }[event.key] ?? 0) * (Math.PI / 180);
    const factor = { ArrowUp: stretch, ArrowDown: 1 / stretch }[event.key] ?? 1;
    const [cos, sin] = [factor * Math.cos(angle), factor * Math.sin(angle)];
    move(index, [x * cos - y * sin, x * sin + y * cos]);
});

// ---- Test vectors --------------------------------------------------------------------------------------------------

async function verify(files) {
    try {
        const result = await checkVectors(files, (n) => (at("verdict").textContent = `${n} cases compared …`));
        tell(result);
    } catch (error) {
        at("verdict").textContent = `These files cannot be read: ${error.message}`;
    }
}

function tell({ operations, different, missing, cases, notPorted }) {
    const agrees = different.length === 0 && cases > 0;
    const sentence = agrees
        ? `${cases} cases of the vectors agree in your browser`
        : `${different.length} of ${cases} cases of the vectors differ`;
    const first = different[0];
    at("verdict").replaceChildren(
        element("b", { class: agrees ? "right" : "wrong" }, `${agrees ? "✓" : "✗"} ${sentence}.`),
        first ? ` The first: ${first.operation}, case ${first.name}: ${first.fault}.` : "",
        missing.length ? ` Not given: ${missing.join(", ")}.` : "",
        notPorted ? ` ${notPorted} cases are of operations that this port does not have.` : "",
    );
    Object.assign(at("verdict").dataset, { cases, different: different.length });
    at("badge").textContent = `${agrees ? "✓" : "✗"} ${sentence}`;
    at("badge").className = agrees ? "right" : "wrong";
    const rows = Object.entries(operations).map(([name, { agree, cases }]) =>
        element("tr", {}, element("td", {}, element("code", {}, name)), element("td", {}, `${agree} of ${cases}`)),
    );
    at("results").replaceChildren(table(["operation", "cases that agree"], rows));
}

async function verifyChosen(list) {
    const chosen = await Promise.all([...list].map(async (file) => [file.name, await file.arrayBuffer()]));
    await verify(new Map(chosen));
}

at("files").addEventListener("change", (event) => verifyChosen(event.target.files));
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
document.addEventListener("drop", (event) => event.dataTransfer.files.length && verifyChosen(event.dataTransfer.files));

show(Object.keys(EXAMPLES)[0]);
embeddedVectors().then((files) => files && verify(files));
