// The official npm clients against a server whose model echoes: node check.mjs URL. Exit code 0: every check held.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const url = process.argv[2];
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const text = "hé 🦆 多";
const messages = [{ role: "user", content: text }];

const checks = {
  async "chat completion"() {
    const answer = await openai.chat.completions.create({ model: "echo", messages, temperature: 0 });
    assert.equal(answer.choices[0].message.content, text);
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },
  async "chat completion, streamed"() {
    const stream = await openai.chat.completions.create({
      model: "echo", messages, temperature: 0, stream: true, stream_options: { include_usage: true },
    });
    let said = "", usage = null, finish = null;
    for await (const chunk of stream) {
      said += chunk.choices[0]?.delta?.content ?? "";
      finish = chunk.choices[0]?.finish_reason ?? finish;
      usage = chunk.usage ?? usage;
    }
    assert.equal(said, text);
    assert.equal(finish, "stop");
    assert.ok(usage.completion_tokens > 0);
  },
  async "chat stream helper"() {
    const stream = openai.chat.completions.stream({ model: "echo", messages, temperature: 0 });
    assert.equal(await stream.finalContent(), text);
  },
  async "completion"() {
    const answer = await openai.completions.create({ model: "echo", prompt: ["ab", "cd"], temperature: 0, logprobs: 1 });
    assert.deepEqual(answer.choices.map((choice) => choice.text), ["ab", "cd"]);
    assert.deepEqual(answer.choices[0].logprobs.tokens, ["a", "b"]);
  },
  async "completion, streamed"() {
    let said = "";
    for await (const chunk of await openai.completions.create({ model: "echo", prompt: text, temperature: 0, stream: true }))
      said += chunk.choices[0].text;
    assert.equal(said, text);
  },
  async "response"() {
    const answer = await openai.responses.create({ model: "echo", input: text, temperature: 0 });
    assert.equal(answer.output_text, text);
    assert.equal(answer.status, "completed");
  },
  async "response, streamed"() {
    const kinds = [];
    const stream = openai.responses.stream({ model: "echo", input: text, temperature: 0 });
    for await (const event of stream) kinds.push(event.type);
    const answer = await stream.finalResponse();
    assert.equal(answer.output_text, text);
    assert.equal(kinds[0], "response.created");
    assert.equal(kinds.at(-1), "response.completed");
  },
  async "embeddings"() {
    const answer = await openai.embeddings.create({ model: "echo", input: ["a", "b"] });
    assert.equal(answer.data.length, 2);
    const length = Math.hypot(...answer.data[0].embedding);
    assert.ok(Math.abs(length - 1) < 1e-5);
  },
  async "models"() {
    const names = [];
    for await (const model of openai.models.list()) names.push(model.id);
    assert.deepEqual(names, ["echo"]);
    assert.equal((await openai.models.retrieve("echo")).id, "echo");
  },
  async "errors"() {
    await assert.rejects(openai.chat.completions.create({ model: "ecko", messages }), OpenAI.NotFoundError);
    await assert.rejects(openai.responses.create({ model: "echo", input: text, store: true }), (error) =>
      error instanceof OpenAI.BadRequestError && error.param === "store");
    await assert.rejects(anthropic.messages.create({ model: "ecko", messages, max_tokens: 9 }), Anthropic.NotFoundError);
    await assert.rejects(anthropic.messages.create({ model: "echo", messages: [], max_tokens: 9 }), Anthropic.BadRequestError);
  },
  async "message"() {
    const answer = await anthropic.messages.create({ model: "echo", messages, max_tokens: 50, system: "be", temperature: 0 });
    assert.equal(answer.content[0].text, text);
    assert.equal(answer.stop_reason, "end_turn");
  },
  async "message, streamed"() {
    let said = "";
    const stream = anthropic.messages.stream({ model: "echo", messages, max_tokens: 50, temperature: 0 });
    stream.on("text", (piece) => { said += piece; });
    const answer = await stream.finalMessage();
    assert.equal(said, text);
    assert.equal(answer.content[0].text, text);
    assert.ok(answer.usage.output_tokens > 0);
  },
  async "token count"() {
    const counted = await anthropic.messages.countTokens({ model: "echo", messages });
    assert.equal(counted.input_tokens, "user".length + 2 + Buffer.byteLength(text));
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok      ${name}`);
  } catch (error) {
    failed++;
    console.log(`FAILED  ${name}: ${error.stack}`);
  }
}
console.log(`${Object.keys(checks).length - failed} of ${Object.keys(checks).length} checks held`);
process.exit(failed ? 1 : 0);
