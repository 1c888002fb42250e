// What llama.cpp makes of a GGUF file: log-probabilities of given tokens, and greedy continuations.
//
// node llama_cpp.mjs ENVIRONMENT < request > answer, both JSON; ENVIRONMENT is the folder that llama_cpp.sh made.
// request: {model, threads, sequences: [[id, ...], ...], prompts: [[id, ...], ...], new_tokens, texts: ["...", ...]}
// answer: {llama_cpp, node_llama_cpp, log_probabilities, continuations, tokens, ends}
//   log_probabilities: of each token of a sequence but the first; continuations: the tokens after each prompt;
//   tokens: what each text is cut into; ends: whether a token is put before and after a text.
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
const model = await llama.loadModel({modelPath: request.model, gpuLayers: 0});
const longest = Math.max(...[...request.sequences, ...request.prompts].map((ids) => ids.length)) + request.new_tokens;
const context = await model.createContext({contextSize: longest + 8, sequences: 1, flashAttention: false});
const sequence = context.getSequence();

// A token's log-probability is its logit less the log of the sum of all; the sampler's defaults would leave most out.
const all = {temperature: 1, topK: 0, topP: 1, minP: 0};

async function logProbabilities(ids) {
    await sequence.clearHistory();
    const asked = ids.slice(0, -1).map((id, index) => [
        id,
        {
            generateNext: {
                logits: {filter: {tokens: [ids[index + 1]], includeTop: 1}},
                totalLogitWeight: true,
                options: all,
            },
        },
    ]);
    const answers = await sequence.controlledEvaluate(asked);
    return answers.map(({next}, index) => {
        const largest = Math.max(...next.logits.values());
        return next.logits.get(ids[index + 1]) - largest - Math.log(next.totalLogitWeight);
    });
}

async function continuation(ids) {
    await sequence.clearHistory();
    const found = [];
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        found.push(token);
        if (found.length === request.new_tokens) break;
    }
    return found;
}

const answer = {
    llama_cpp: llama.llamaCppRelease.release,
    node_llama_cpp: JSON.parse(readFileSync(join(folder, "package.json"), "utf8")).version,
    log_probabilities: [],
    continuations: [],
    tokens: request.texts.map((text) => model.tokenize(text, false)),
    ends: [model.tokens.shouldPrependBosToken, model.tokens.shouldAppendEosToken],
};
for (const ids of request.sequences) answer.log_probabilities.push(await logProbabilities(ids));
for (const ids of request.prompts) answer.continuations.push(await continuation(ids));
process.stdout.write(JSON.stringify(answer) + "\n", () => process.exit(0));
