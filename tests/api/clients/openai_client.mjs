// What OpenAI's own client for JavaScript gets of an API: node openai_client.mjs URL MODEL, questions as JSON on standard
// input, what it read as JSON on standard output. It judges nothing.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const questions = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0, timeout: 60_000 });
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { type: "function", function: { name: "weather", description: "Tells the weather.", parameters } };
const format = { type: "json_schema", json_schema: { name: "place", schema: parameters, strict: true } };
const asked = (content, fields) => ({
  model,
  messages: [{ role: "user", content }],
  temperature: 0,
  max_tokens: 100,
  ...fields,
});
const brief = ({ choices: [{ message, finish_reason }], usage }) => ({
  text: message.content,
  calls: (message.tool_calls ?? []).map((call) => [call.function.name, call.function.arguments]),
  reason: finish_reason,
  tokens: usage?.completion_tokens,
});

const told = {
  async models() {
    const ids = [];
    for await (const each of client.models.list()) ids.push(each.id);
    return ids;
  },
  async whole(text) {
    return brief(await client.chat.completions.create(asked(text)));
  },
  async streamed(text) {
    const pieces = [];
    let usage;
    const fields = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create(asked(text, fields))) {
      pieces.push(chunk.choices[0]?.delta.content ?? "");
      usage = chunk.usage ?? usage;
    }
    return { text: pieces.join(""), pieces: pieces.filter(Boolean).length, tokens: usage.completion_tokens };
  },
  async called(text) {
    const tool_choice = { type: "function", function: { name: "weather" } };
    return brief(await client.chat.completions.create(asked(text, { tools: [weather], tool_choice })));
  },
  async called_streamed(text) {
    return brief(await client.chat.completions.stream(asked(text, { tools: [weather] })).finalChatCompletion());
  },
  async run(text) {
    const cities = [];
    const run = (city) => (cities.push(city), "say sunny");
    const tool = { ...weather, function: { ...weather.function, parse: JSON.parse, function: ({ city }) => run(city) } };
    return { cities, text: await client.chat.completions.runTools(asked(text, { tools: [tool] })).finalContent() };
  },
  async structured(text) {
    const answer = await client.chat.completions.parse(asked(text, { response_format: format }));
    return answer.choices[0].message.content;
  },
  async structured_streamed(text) {
    const stream = client.chat.completions.stream(asked(text, { response_format: format }));
    return (await stream.finalChatCompletion()).choices[0].message.content;
  },
  async responses(text) {
    const events = [];
    for await (const event of await client.responses.create({ model, input: text, stream: true })) events.push(event.type);
    return { text: (await client.responses.create({ model, input: text })).output_text, last: events.at(-1) };
  },
  async completion(text) {
    return (await client.completions.create({ model, prompt: text })).choices[0].text;
  },
  async embedded(text) {
    return (await client.embeddings.create({ model, input: text })).data[0].embedding.map((each) => typeof each);
  },
  async unknown_model(text) {
    return client.chat.completions.create(asked(text, { model: "nobody/nothing" }));
  },
  async failing(text) {
    return client.chat.completions.create(asked(text));
  },
  async broken_stream(text) {
    for await (const _ of await client.chat.completions.create(asked(text, { stream: true })));
  },
  async aborted(text) {
    const stream = await client.chat.completions.create(asked(text, { stream: true }));
    for await (const _ of stream) break; // which aborts it
    return true;
  },
};

const answers = {};
for (const [name, text] of Object.entries(questions)) {
  try {
    answers[name] = await told[name](text);
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    answers[name] = { error: error.constructor.name, status: error.status, code: error.code, message: error.message };
  }
}
console.log(JSON.stringify(answers));
