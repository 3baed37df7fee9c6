// Anthropic's client for JavaScript, and the AI SDK's provider of Messages: messages, streams, tools, parse, models.
import assert from "node:assert/strict";
import test from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodOutputFormat } from "@anthropic-ai/sdk/helpers/beta/zod";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const client = new Anthropic({ baseURL: process.env.SERVER_URL, apiKey: "none", maxRetries: 0 });
const model = process.env.SERVER_MODEL;
const messages = [{ role: "user", content: "Name a bird." }];
const Bird = z.object({ red: z.boolean() }); // Anthropic's client asks for no more than types
const tools = [{ name: "report", input_schema: z.toJSONSchema(Bird) }];

test("a message says the same streamed", async () => {
  const whole = await client.messages.create({ model, messages, max_tokens: 8 });
  const streamed = await client.messages.stream({ model, messages, max_tokens: 8 }).finalMessage();
  assert.equal(streamed.usage.output_tokens, whole.usage.output_tokens);
  assert.match(whole._request_id, /^req-/);
});

test("tools", async () => {
  const answer = await client.messages.create({
    model, messages, tools, max_tokens: 60, tool_choice: { type: "tool", name: "report" },
  });
  const [call] = answer.content;
  Bird.parse(call.input);
  const result = { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "done" }] };
  const history = [...messages, { role: "assistant", content: answer.content }, result];
  await client.messages.create({ model, messages: history, tools, max_tokens: 8 });
});

test("parse, in its beta", async () => {
  const answer = await client.beta.messages.parse({
    model, messages, max_tokens: 60, output_format: betaZodOutputFormat(Bird),
  });
  Bird.parse(answer.parsed_output);
});

test("models, page by page", async () => {
  const names = [];
  for await (const each of client.models.list({ limit: 1 })) {
    names.push(each.display_name);
    assert.ok(names.length < 1000);
  }
  assert.ok(names.includes(model));
});

test("errors are of their classes", async () => {
  await assert.rejects(client.messages.create({ model: "nobody", messages, max_tokens: 8 }), Anthropic.NotFoundError);
});

test("the AI SDK", async () => {
  const ask = { model: createAnthropic({ baseURL: `${process.env.SERVER_URL}/v1`, apiKey: "none" })(model), maxRetries: 0 };
  assert.ok((await generateText({ ...ask, prompt: "Hello", maxOutputTokens: 8 })).usage.outputTokens > 0);
  assert.ok(await streamText({ ...ask, prompt: "Hello", maxOutputTokens: 8 }).text);
  Bird.parse((await generateObject({ ...ask, prompt: "Name a bird.", schema: Bird, maxOutputTokens: 60 })).object);
  const report = tool({ description: "Report a bird.", inputSchema: Bird, execute: async () => "done" });
  const asked = { ...ask, prompt: "Name a bird.", tools: { report }, toolChoice: "required", maxOutputTokens: 60 };
  assert.equal((await generateText(asked)).toolCalls[0].toolName, "report");
});
