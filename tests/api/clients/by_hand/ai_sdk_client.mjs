// Vercel's AI SDK with its provider for APIs like OpenAI's: node ai_sdk_client.mjs URL MODEL
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "petals-win", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
const fields = { model: provider(name), maxRetries: 0 };
const place = z.object({ city: z.string() });

assert.equal((await generateText({ ...fields, prompt: "say Grüße 🎉" })).text, "Grüße 🎉");
console.log("chat");
assert.equal(await streamText({ ...fields, prompt: "say Grüße 🎉" }).text, "Grüße 🎉");
console.log("stream");
const weather = tool({
  description: "Tells the weather of a city.",
  inputSchema: place,
  execute: async ({ city }) => `say sunny in ${city}`,
});
const asked = { ...fields, tools: { weather }, stopWhen: stepCountIs(3), prompt: 'call weather {"city":"Köln"}' };
assert.equal((await generateText(asked)).text, "sunny in Köln");
assert.equal(await streamText(asked).text, "sunny in Köln");
console.log("tool");
const held = { ...fields, output: Output.object({ schema: place }), prompt: 'say {"city":"Köln"}' };
assert.deepEqual((await generateText(held)).output, { city: "Köln" });
console.log("object");
