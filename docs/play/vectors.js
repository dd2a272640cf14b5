// Reads kvcluster's test vectors (docs/vectors/README.md) and compares the functions of contract.js with them.

"use strict";

// How each operation of the port is called: its inputs and parameters to its outputs.
const PORTED = {
    alternating_partition: (_, { size }) => {
        const { sources, destinations } = alternatingPartition(size);
        const asArray = (entries) => arrayOf([entries.length], entries);
        return { sources: asArray(sources), destinations: asArray(destinations) };
    },
    similarity: ({ a, b }) => ({ similarity: similarity(a, b) }),
    merge: ({ array, labels, counts }) => ({ centroids: merge(array, labels, counts) }),
    chunked_soft_matching: ({ keys }, { keep_ratio, chunk_size }) => chunkedSoftMatching(keys, keep_ratio, chunk_size),
    attention: ({ query, keys, values }, { scale }) => ({ output: attention(query, keys, values, scale ?? undefined) }),
    clustered_attention: ({ query, keys, values, counts }, { scale }) => ({
        output: clusteredAttention(query, keys, values, counts, scale ?? undefined),
    }),
};

// ---- Files ---------------------------------------------------------------------------------------------------------

const WIDTHS = { F16: 2, BF16: 2, F32: 4, F64: 8, I64: 8 }; // bytes of a number

// safetensors: 8 bytes with the length of a JSON header, the header, the arrays. Name to { dtype, shape, bytes }.
function readSafetensors(buffer) {
    if (buffer.byteLength < 8) throw new Error("no safetensors file");
    const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
    if (start > buffer.byteLength) throw new Error("no safetensors file");
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
    const tensors = new Map();
    for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
        if (name === "__metadata__") continue;
        const bytes = new Uint8Array(buffer.slice(start + offsets[0], start + offsets[1]));
        if (bytes.length !== size(shape) * WIDTHS[dtype]) throw new Error(`the header is wrong about ${name}`);
        tensors.set(name, { dtype, shape, bytes });
    }
    return tensors;
}

// The array that contract.js computes with: all numbers as float64, which holds them exactly.
function arrayFrom({ dtype, shape, bytes }) {
    const view = new DataView(bytes.buffer);
    const read = {
        F16: (at) => from16Bits(view.getUint16(at, true), 10),
        BF16: (at) => from16Bits(view.getUint16(at, true), 7),
        F32: (at) => view.getFloat32(at, true),
        F64: (at) => view.getFloat64(at, true),
        I64: (at) => Number(view.getBigInt64(at, true)),
    }[dtype];
    return { shape, numbers: Float64Array.from({ length: size(shape) }, (_, i) => read(i * WIDTHS[dtype])) };
}

// Sign, exponent and fraction: 5 and 10 bits in float16, 8 and 7 in bfloat16; there is no infinity and no NaN.
function from16Bits(bits, fractionBits) {
    const one = 2 ** fractionBits;
    const bias = 2 ** (14 - fractionBits) - 1;
    const fraction = bits % one;
    const exponent = Math.floor((bits % 32768) / one);
    const magnitude = (exponent ? one + fraction : fraction) * 2 ** (Math.max(exponent, 1) - bias - fractionBits);
    return bits >= 32768 ? -magnitude : magnitude;
}

// ---- Comparing -----------------------------------------------------------------------------------------------------

// What is wrong with one output, in words, or null.
function fault(mine, name, tensors, prefix, compare) {
    const right = tensors.get(prefix + name);
    if (!mine) return `${name} is missing`;
    if (String(mine.shape) !== String(right.shape)) return `${name} has shape (${mine.shape}), not (${right.shape})`;
    const expected = arrayFrom(right).numbers;
    const bound = compare === "bound" ? arrayFrom(tensors.get(`${prefix}bound`)).numbers : null;
    const perBound = bound && expected.length / bound.length;
    for (let i = 0; i < expected.length; i++) {
        const [got, wanted] = [mine.numbers[i], expected[i]];
        const allowed = bound && bound[Math.floor(i / perBound)];
        const holds = bound ? Math.abs(got - wanted) <= allowed : Object.is(got, wanted); // Object.is: -0 is not 0
        if (!holds) return `${name}[${i}] is ${got}, not ${wanted}${bound ? ` (within ${allowed})` : ""}`;
    }
    return null;
}

// Compares one case of the manifest; null if it agrees, else what differs first.
function checkCase(test, tensors) {
    const inputs = {};
    for (const name of Object.keys(test.inputs)) inputs[name] = arrayFrom(tensors.get(`${test.name}/in/${name}`));
    let results;
    try {
        results = PORTED[test.operation](inputs, test.parameters);
    } catch (error) {
        return String(error);
    }
    for (const [name, { compare }] of Object.entries(test.outputs)) {
        const found = fault(results[name], name, tensors, `${test.name}/out/`, compare);
        if (found) return found;
    }
    return null;
}

// Compares all cases of the operations above that are in the files, a Map from a name to an ArrayBuffer.
// Counts of each operation, what differs, and the number of cases of operations that are not ported.
async function checkVectors(files, onCase = () => {}) {
    if (!files.has("manifest.json")) throw new Error("there is no manifest.json among the files");
    const manifest = JSON.parse(new TextDecoder().decode(files.get("manifest.json")));
    if (manifest.format !== "kvcluster vectors") throw new Error("manifest.json is not one of kvcluster's vectors");
    if (manifest.arithmetic_contract !== 1) throw new Error(`another contract, ${manifest.arithmetic_contract}`);
    const result = { operations: {}, different: [], missing: [], cases: 0, notPorted: 0 };
    const tensorsOf = {};
    for (const operation of Object.keys(PORTED)) {
        const name = `${operation}.safetensors`;
        if (files.has(name)) tensorsOf[operation] = readSafetensors(files.get(name));
        else result.missing.push(name);
    }
    for (const test of manifest.cases) {
        if (!(test.operation in PORTED)) result.notPorted++;
        if (!(test.operation in tensorsOf)) continue;
        const found = checkCase(test, tensorsOf[test.operation]);
        const counts = (result.operations[test.operation] ??= { cases: 0, agree: 0 });
        counts.cases++;
        result.cases++;
        if (found) result.different.push({ operation: test.operation, name: test.name, fault: found });
        else counts.agree++;
        if (result.cases % 8 === 0) {
            onCase(result.cases);
            await new Promise((resolve) => setTimeout(resolve)); // the page stays alive
        }
    }
    return result;
}

// The vectors that docs/site/play.py has put into the page: gzip in base64. Null if there are none.
async function embeddedVectors() {
    const files = new Map();
    for (const element of document.querySelectorAll("script[type='application/gzip']")) {
        const bytes = Uint8Array.from(atob(element.textContent.trim()), (character) => character.charCodeAt(0));
        const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
        files.set(element.dataset.name, await new Response(stream).arrayBuffer());
    }
    return files.size ? files : null;
}
