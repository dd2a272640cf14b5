// kvcluster's arithmetic contract in JavaScript: similarity, matching, merging, attention, with the bits of NumPy.
//
// reference/SPECIFICATION.md is followed paragraph by paragraph; the numbers in comments are its own. Nothing is
// needed: every number of JavaScript is a float64, its + - * / are rounded as IEEE 754 says, and Math.fround rounds to
// float32. vectors.js beside this file compares every function with the project's test vectors.
//
// An array is { shape, numbers }, its numbers in a Float64Array, the last axis fastest: float64 holds every float16,
// bfloat16 and float32 as it is (1.2). Integers, such as labels and counts, are arrays too. A row is one token's part.

"use strict";

// ---- 3  Who may merge with whom ------------------------------------------------------------------------------------

// Even entries look for an odd one to join.
function alternatingPartition(size) {
    const entries = Array.from({ length: size }, (_, entry) => entry);
    return { sources: entries.filter((entry) => entry % 2 === 0), destinations: entries.filter((entry) => entry % 2) };
}

// ---- 4  How alike two keys are -------------------------------------------------------------------------------------

// Sum of a[i] * b[i] in the one order that counts (2.3): zeros up to a power of two, then halves are added until one
// number is left. The products of float32 numbers are exact in float64 (2.4).
function halvingDot(a, b) {
    let half = 1;
    while (half < a.length) half *= 2;
    const terms = new Float64Array(half);
    for (let i = 0; i < a.length; i++) terms[i] = a[i] * b[i];
    while (half > 1) {
        half /= 2;
        for (let i = 0; i < half; i++) terms[i] += terms[half + i];
    }
    return terms[0];
}

// The signed squared cosine of two rows (4.1); 0 where one of them is zero (4.2).
function rowSimilarity(a, b) {
    const dot = halvingDot(a, b);
    const norms = halvingDot(a, a) * halvingDot(b, b);
    return norms === 0 ? 0 : (dot * Math.abs(dot)) / norms;
}

// (..., m, dim) and (..., n, dim) to (..., m, n).
function similarity(a, b) {
    const right = problems(b);
    const numbers = problems(a).flatMap((rows, problem) =>
        rows.flatMap((row) => right[problem].map((other) => rowSimilarity(row, other))),
    );
    return arrayOf([...a.shape.slice(0, -1), b.shape.at(-2)], numbers);
}

// ---- 5  Which tokens of a chunk share an entry ---------------------------------------------------------------------

// Labels (..., tokens) and counts (..., entries) of keys (..., tokens, dim).
function chunkedSoftMatching(keys, keepRatio, chunkSize = 256) {
    const clusterings = problems(keys).map((rows) => clusterRows(rows, keepRatio, chunkSize));
    const lead = keys.shape.slice(0, -2);
    const tokens = keys.shape.at(-2);
    const chunks = Math.floor(tokens / chunkSize);
    const entries = chunks * targetOf(keepRatio, chunkSize) + tokens - chunks * chunkSize;
    return {
        labels: arrayOf([...lead, tokens], clusterings.flatMap((clustering) => clustering.labels)),
        counts: arrayOf([...lead, entries], clusterings.flatMap((clustering) => clustering.counts)),
    };
}

// Entries that a chunk becomes (5.1): the product is rounded to float64 before the ceiling.
function targetOf(keepRatio, chunkSize) {
    return Math.ceil(keepRatio * chunkSize);
}

// One problem: whole chunks one after the other, then the tokens of the rest, each for itself (5.2, 5.8).
function clusterRows(rows, keepRatio, chunkSize) {
    const target = targetOf(keepRatio, chunkSize);
    const labels = [];
    let first = 0; // label of the next chunk's first entry
    for (let start = 0; start + chunkSize <= rows.length; start += chunkSize, first += target) {
        const rounds = matchingRounds(rows.slice(start, start + chunkSize), target);
        const inChunk = rounds.length ? rounds.at(-1).labels : alone(chunkSize);
        labels.push(...inChunk.map((label) => first + label));
    }
    while (labels.length < rows.length) labels.push(first++);
    return { labels, counts: countsOf(labels) };
}

// The rounds of one chunk until `target` entries are left (5.3), each with its decision and the labels after it.
function matchingRounds(rows, target) {
    const rounds = [];
    let labels = alone(rows.length);
    let size = rows.length;
    while (size > target) {
        const nMerged = Math.min(Math.floor(size / 2), size - target);
        const centroids = means(rows, labels, countsOf(labels)); // of the original tokens, in every round (5.7)
        const round = matchRound(centroids, nMerged);
        labels = labels.map((label) => round.entryOfEntry[label]);
        size -= nMerged;
        rounds.push({ ...round, centroids, labels });
    }
    return rounds;
}

// One round: `matches` from the best to the worst, of which the first `nMerged` join (5.4, 5.5).
function matchRound(centroids, nMerged) {
    const { sources, destinations } = alternatingPartition(centroids.length);
    const matches = sources.map((source) => {
        const similarities = destinations.map((other) => rowSimilarity(centroids[source], centroids[other]));
        const best = firstLargest(similarities);
        return { source, destination: destinations[best], similarity: similarities[best], similarities };
    });
    matches.sort((one, other) => other.similarity - one.similarity || one.source - other.source); // of ties, the first
    const joined = alone(centroids.length);
    for (const { source, destination } of matches.slice(0, nMerged)) joined[source] = destination;
    return { matches, nMerged, entryOfEntry: renumbered(joined) };
}

// Index of the largest number, of ties the first (2.5).
function firstLargest(numbers) {
    let best = 0;
    for (let i = 1; i < numbers.length; i++) if (numbers[i] > numbers[best]) best = i;
    return best;
}

// Entries that stay are numbered again in their order; those that joined get the number of their destination (5.6).
function renumbered(joined) {
    const numbers = [];
    let next = 0;
    joined.forEach((destination, entry) => (numbers[entry] = destination === entry ? next++ : -1));
    return joined.map((destination) => numbers[destination]);
}

// Every token is an entry of its own.
function alone(size) {
    return Array.from({ length: size }, (_, token) => token);
}

// How many tokens have each label; every label has one.
function countsOf(labels) {
    const counts = [];
    for (const label of labels) counts[label] = (counts[label] ?? 0) + 1;
    return counts;
}

// ---- 6  A cluster becomes one centroid -----------------------------------------------------------------------------

// Means (..., entries, dim), float32, of an array (..., tokens, dim).
function merge(array, labels, counts) {
    const tokens = array.shape.at(-2);
    const entries = counts.shape.at(-1);
    const rows = problems(array).flatMap((rows, problem) =>
        means(rows, part(labels, problem, tokens), part(counts, problem, entries)),
    );
    return arrayOf([...counts.shape, array.shape.at(-1)], rows.flatMap((row) => Array.from(row)));
}

// Members are added in the order of the tokens (6.1), starting from -0, which alone changes no number (6.2); the sum is
// divided by the count and rounded once (6.3).
function means(rows, labels, counts) {
    const sums = Array.from(counts, () => new Float64Array(rows[0].length).fill(-0));
    rows.forEach((row, token) => {
        const sum = sums[labels[token]];
        for (let i = 0; i < row.length; i++) sum[i] = sum[i] + row[i];
    });
    return sums.map((sum, entry) => sum.map((total) => Math.fround(total / counts[entry])));
}

// ---- 7, 8  Attention -----------------------------------------------------------------------------------------------

function attention(query, keys, values, scale) {
    const ones = { shape: keys.shape.slice(0, -1), numbers: new Float64Array(size(keys.shape.slice(0, -1))).fill(1) };
    return clusteredAttention(query, keys, values, ones, scale);
}

// An entry that stands for n tokens weighs as much as n of them: log(n) is added to its logit. No bit is prescribed
// here, only a bound (15): exponentials and logarithms differ from machine to machine.
function clusteredAttention(query, keys, values, counts, scale = 1 / Math.sqrt(query.shape.at(-1))) {
    const [keyRows, valueRows] = [problems(keys), problems(values)];
    const dimValue = values.shape.at(-1);
    const outputs = problems(query).flatMap((queries, problem) =>
        queries.map((row) => {
            const ofProblem = part(counts, problem, keys.shape.at(-2));
            const weights = softmax(
                keyRows[problem].map((key, entry) => scale * halvingDot(row, key) + Math.log(ofProblem[entry])),
            );
            const output = new Float64Array(dimValue);
            valueRows[problem].forEach((value, entry) => {
                for (let i = 0; i < dimValue; i++) output[i] += weights[entry] * value[i];
            });
            return output;
        }),
    );
    return arrayOf([...query.shape.slice(0, -1), dimValue], outputs.flatMap((row) => Array.from(row)));
}

// The largest logit is subtracted first (7.2); a count of 0 has the logit -Infinity and the weight 0 (8.2).
function softmax(logits) {
    const largest = logits.reduce((one, other) => Math.max(one, other));
    const exponentials = logits.map((logit) => Math.exp(logit - largest));
    const sum = exponentials.reduce((one, other) => one + other);
    return exponentials.map((exponential) => exponential / sum);
}

// ---- Arrays --------------------------------------------------------------------------------------------------------

function arrayOf(shape, numbers) {
    return { shape, numbers: Float64Array.from(numbers) };
}

function size(shape) {
    return shape.reduce((one, other) => one * other, 1);
}

// The rows of each leading index (1.1): every one is a problem of its own.
function problems(array) {
    const [tokens, dim] = array.shape.slice(-2);
    return Array.from({ length: size(array.shape.slice(0, -2)) }, (_, problem) =>
        Array.from({ length: tokens }, (_, token) => part(array, problem * tokens + token, dim)),
    );
}

// The numbers [index * length, (index + 1) * length).
function part(array, index, length) {
    return array.numbers.subarray(index * length, (index + 1) * length);
}
