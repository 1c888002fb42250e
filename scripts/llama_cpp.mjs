// What llama.cpp makes of GGUF files: log-probabilities of given tokens, greedy continuations, and how fast it is.
//
// node llama_cpp.mjs ENVIRONMENT < request > answer, both JSON; ENVIRONMENT is the folder that llama_cpp.sh made.
// request: {models: [path, ...], threads, sequences: [[id, ...], ...], prompts: [[id, ...], ...], new_tokens,
//           texts: ["...", ...], timed: [id, ...], repeats}
// answer: {llama_cpp, node_llama_cpp, models: [{log_probabilities, continuations, tokens, ends, times}, ...]}
//   log_probabilities: of each token of a sequence but the first; continuations: the tokens after each prompt;
//   tokens: what each text is cut into; ends: whether a token is put before and after a text;
//   times: [[seconds to the first token after `timed`, seconds for each new token from then on], ...], a pair for each
//   of `repeats` rounds, in each of which every model has its turn; the first round of all is not counted.
import {readFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const folder = join(process.argv[2], "node_modules", "node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(join(folder, "dist", "index.js")));
const request = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({
    gpu: false,
    build: "never",
    maxThreads: request.threads,  // as many as cores are free: more wait for each other
    logLevel: LlamaLogLevel.warn,
    logger: (level, message) => process.stderr.write(`${message}\n`),
});
const asked = [...request.sequences, ...request.prompts, request.timed];
const contextSize = Math.max(...asked.map((ids) => ids.length)) + request.new_tokens + 8;
const opened = [];
for (const modelPath of request.models) {
    const model = await llama.loadModel({modelPath, gpuLayers: 0});
    const context = await model.createContext({contextSize, sequences: 1, flashAttention: false});
    opened.push({model, sequence: context.getSequence()});
}

// A token's log-probability is its logit less the log of the sum of all; the sampler's defaults would leave most out.
const all = {temperature: 1, topK: 0, topP: 1, minP: 0};

async function logProbabilities(sequence, ids) {
    await sequence.clearHistory();
    const wanted = ids.slice(0, -1).map((id, index) => [
        id,
        {
            generateNext: {
                logits: {filter: {tokens: [ids[index + 1]], includeTop: 1}},
                totalLogitWeight: true,
                options: all,
            },
        },
    ]);
    const answers = await sequence.controlledEvaluate(wanted);
    return answers.map(({next}, index) => {
        const largest = Math.max(...next.logits.values());
        return next.logits.get(ids[index + 1]) - largest - Math.log(next.totalLogitWeight);
    });
}

async function continuation(sequence, ids) {
    await sequence.clearHistory();
    const found = [];
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        found.push(token);
        if (found.length === request.new_tokens) break;
    }
    return found;
}

async function time(sequence, ids) {
    await sequence.clearHistory();
    const start = performance.now();
    let first, found = 0;
    for await (const _ of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        first ??= performance.now();
        if (++found === request.new_tokens) break;
    }
    if (found < 2) throw new Error(`the model ends after ${found} tokens, of which none can be timed`);
    return [(first - start) / 1000, (performance.now() - first) / 1000 / (found - 1)];
}

const answer = {
    llama_cpp: llama.llamaCppRelease.release,
    node_llama_cpp: JSON.parse(readFileSync(join(folder, "package.json"), "utf8")).version,
    models: [],
};
for (const {model, sequence} of opened) {
    const found = {
        log_probabilities: [],
        continuations: [],
        tokens: request.texts.map((text) => model.tokenize(text, false)),
        ends: [model.tokens.shouldPrependBosToken, model.tokens.shouldAppendEosToken],
        times: [],
    };
    for (const ids of request.sequences) found.log_probabilities.push(await logProbabilities(sequence, ids));
    for (const ids of request.prompts) found.continuations.push(await continuation(sequence, ids));
    answer.models.push(found);
}
for (let round = 0; request.timed.length && round <= request.repeats; round++) {
    for (const [index, {sequence}] of opened.entries()) {
        const times = await time(sequence, request.timed);
        if (round) answer.models[index].times.push(times);
    }
}
process.stdout.write(JSON.stringify(answer) + "\n", () => process.exit(0));
