// What the page shows at each step: step 0 is the keys, then every round has two, finding partners and joining them.

"use strict";

const COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2"]; // Okabe and Ito
const NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef"; // of entries: that of the token in whose place they are

// Everything that is drawn, from keys [[x, y], ...], chunk size, keep ratio and the number of the step.
function stateOf(keys, chunkSize, keepRatio, step) {
    const rows = keys.map((key) => Float64Array.from(key));
    const target = targetOf(keepRatio, chunkSize);
    const chunks = [];
    for (let start = 0; start + chunkSize <= rows.length; start += chunkSize) {
        const inChunk = rows.slice(start, start + chunkSize);
        const from = (4 * chunks.length) % COLOURS.length; // chunks beside one another have other colours
        const palette = [...COLOURS.slice(from), ...COLOURS.slice(0, from)];
        chunks.push({ start, palette, rows: inChunk, rounds: matchingRounds(inChunk, target) });
    }
    const nRounds = chunks.length ? chunks[0].rounds.length : 0; // the same in every chunk (5.3)
    step = Math.min(step, 2 * nRounds);
    const done = Math.floor(step / 2); // rounds that have joined
    const isMatching = step % 2 === 1;
    let first = 0;
    const parts = chunks.map((chunk) => {
        const entries = entriesOfChunk(chunk, done, first);
        first += entries.length;
        return { entries, round: isMatching ? chunk.rounds[done] : null };
    });
    const rest = rows.slice(chunks.length * chunkSize).map((row, i) => {
        const token = chunks.length * chunkSize + i;
        return { label: first + i, name: NAMES[token], tokens: [token], centroid: row };
    });
    if (rest.length) parts.push({ entries: rest, round: null, isRest: true });
    const entries = parts.flatMap((part) => part.entries);
    const labels = [];
    entries.forEach((entry) => entry.tokens.forEach((token) => (labels[token] = entry.label)));
    return { keys: rows, chunkSize, target, step, nSteps: 2 * nRounds, done, isMatching, parts, entries, labels };
}

// Entries of a chunk after its first `done` rounds. A cluster keeps the name of the destination, and a colour.
function entriesOfChunk({ start, palette, rows, rounds }, done, first) {
    let places = alone(rows.length);
    let labels = alone(rows.length);
    let colours = rows.map(() => null);
    for (const { matches, nMerged, labels: after } of rounds.slice(0, done)) {
        const joining = matches.slice(0, nMerged);
        for (const { source, destination } of joining) colours[destination] ??= colours[source];
        for (const { destination } of joining) colours[destination] ??= unused(colours, palette);
        const stays = places.map((_, entry) => !joining.some(({ source }) => source === entry));
        places = places.filter((_, entry) => stays[entry]);
        colours = colours.filter((_, entry) => stays[entry]);
        labels = after;
    }
    const centroids = means(rows, labels, countsOf(labels));
    return places.map((place, entry) => ({
        label: first + entry,
        name: NAMES[start + place],
        tokens: labels.flatMap((label, token) => (label === entry ? [start + token] : [])),
        centroid: centroids[entry],
        colour: colours[entry],
    }));
}

// The colour that the fewest have.
function unused(colours, palette) {
    const users = palette.map((colour) => colours.filter((other) => other === colour).length);
    return palette[users.indexOf(Math.min(...users))];
}

// ---- In words ------------------------------------------------------------------------------------------------------

// The story of a step, a few sentences.
function storyOf(state) {
    const { keys, chunkSize, target, parts, isMatching, step, nSteps } = state;
    const whole = parts.filter((part) => !part.isRest);
    const rest = keys.length - whole.length * chunkSize;
    const sentences = [];
    if (!nSteps) {
        const isWhole = whole.length > 0;
        sentences.push(isWhole ? "Every token is kept: there is nothing to join." : "There is no whole chunk yet.");
    } else if (step === 0) {
        const chunks = whole.length === 1 ? "The chunk" : `Each of the ${whole.length} chunks`;
        sentences.push(`${keys.length} tokens, one key each. ${chunks} of ${chunkSize} shall become ${target}.`);
        sentences.push("Tokens whose keys point the same way will share an entry.");
    } else if (isMatching) {
        sentences.push(...matchingStory(state, whole));
    } else {
        sentences.push(...joinedStory(state, whole));
    }
    if (rest && (step === 0 || step === nSteps)) {
        sentences.push(`The last ${rest === 1 ? "token is" : `${rest} tokens are`} no whole chunk and stay exact.`);
    }
    const title = step === 0 ? "The keys" : `Round ${Math.ceil(step / 2)}: ${isMatching ? "look" : "join"}`;
    return { title, sentences };
}

function matchingStory({ chunkSize, target }, whole) {
    const { matches, nMerged } = whole[0].round;
    const size = whole[0].entries.length;
    const each = whole.length > 1 ? "In each chunk every" : "Every";
    const sentences = [`${each} second entry, a circle, looks for the square that points most nearly the same way.`];
    const goal = `${size} entries shall become ${target}, and a round can join at most half of them`;
    sentences.push(
        nMerged === matches.length
            ? `${goal}: ${nMerged === 1 ? "the one pair joins" : `all ${nMerged} join`}.`
            : `${goal}: the best ${nMerged === 1 ? "pair joins" : `${nMerged} join`}, the rest is cut.`,
    );
    for (const { entries, round } of whole) sentences.push(...tiesOf(round, entries));
    return sentences;
}

// Equal candidates, and who wins: always the first.
function tiesOf({ matches, nMerged }, entries) {
    const found = [];
    for (const match of matches) {
        const others = tiedWith(match);
        if (others.length) {
            const names = [match.destination, ...others].map((entry) => entries[entry].name);
            const all = names.join(" and ");
            found.push(`Tie: ${entries[match.source].name} is exactly as near to ${all}; the first wins.`);
        }
    }
    if (isTiedAtCut({ matches, nMerged }, matches[nMerged - 1])) {
        const [last, next] = [entries[matches[nMerged - 1].source].name, entries[matches[nMerged].source].name];
        found.push(`Tie at the cut: ${last} and ${next} have partners exactly as near; the first joins.`);
    }
    return found;
}

// Other destinations of exactly the similarity of the match; all have larger numbers.
function tiedWith({ similarities, similarity, destination }) {
    const all = similarities.flatMap((other, i) => (other === similarity ? [2 * i + 1] : []));
    return all.filter((entry) => entry !== destination);
}

// Whether a match is as good as the last that joins and as the first that does not.
function isTiedAtCut({ matches, nMerged }, { similarity }) {
    const [last, next] = matches.slice(nMerged - 1, nMerged + 1);
    return next !== undefined && similarity === last.similarity && similarity === next.similarity;
}

function joinedStory({ keys, entries, step, nSteps, target, chunkSize }, whole) {
    const shared = whole.flatMap((part) => part.entries).filter(({ tokens }) => tokens.length > 1);
    const largest = shared.reduce((one, other) => (other.tokens.length > one.tokens.length ? other : one));
    const sentences = [
        `${largest.name} now stands for ${largest.tokens.length} tokens (${largest.tokens.join(", ")}): ` +
            "its thick arrow, the centroid, is the mean of their keys.",
    ];
    if (step < nSteps) {
        const size = whole[0].entries.length;
        sentences.push(`${size} of ${chunkSize} are left and shall become ${target}: another round, on the centroids.`);
    } else {
        sentences.push(`Done: ${entries.length} entries stand for ${keys.length} tokens.`);
        sentences.push("Compare what the query looks at; drag it.");
    }
    return sentences;
}

// ---- Attention -----------------------------------------------------------------------------------------------------

// Shares of attention: of all tokens, of entries with log counts, of entries without. Unit vectors as values give them.
function sharesOf({ keys, entries }, query) {
    const asArray = (rows) => arrayOf([rows.length, 2], rows.flatMap((row) => Array.from(row)));
    const units = (n) => arrayOf([n, n], alone(n * n).map((i) => (i % (n + 1) === 0 ? 1 : 0)));
    const [row, tokens] = [asArray([query]), asArray(keys)];
    const centroids = asArray(entries.map(({ centroid }) => centroid));
    const counts = arrayOf([entries.length], entries.map(({ tokens }) => tokens.length));
    return {
        ofTokens: Array.from(attention(row, tokens, units(keys.length)).numbers),
        ofEntries: Array.from(clusteredAttention(row, centroids, units(entries.length), counts).numbers),
        withoutCounts: Array.from(attention(row, centroids, units(entries.length)).numbers),
    };
}
