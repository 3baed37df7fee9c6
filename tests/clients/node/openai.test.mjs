// OpenAI's client for JavaScript: chat, streaming, parse, tools.
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.SERVER_URL}/v1`, apiKey: "none", maxRetries: 0 });
const model = process.env.SERVER_MODEL;
const messages = [{ role: "user", content: "Name a bird." }];
const Bird = z.object({ colour: z.enum(["red", "green"]), wings: z.number().int().min(0).max(9) });

test("chat says the same streamed", async () => {
  const asked = { model, messages, max_tokens: 8, temperature: 0 };
  const whole = await client.chat.completions.create(asked);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
    text += chunk.choices[0]?.delta.content ?? "";
  assert.equal(text, whole.choices[0].message.content);
});

test("parse", async () => {
  const answer = await client.chat.completions.parse({
    model, messages, max_tokens: 60, response_format: zodResponseFormat(Bird, "bird"),
  });
  Bird.parse(answer.choices[0].message.parsed);
});

test("tools", async () => {
  const answer = await client.chat.completions.parse({
    model, messages, max_tokens: 60, parallel_tool_calls: false, tool_choice: "required",
    tools: [zodFunction({ name: "report", parameters: Bird })],
  });
  const message = answer.choices[0].message;
  Bird.parse(message.tool_calls[0].function.parsed_arguments);
  const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "done" };
  await client.chat.completions.create({ model, messages: [...messages, message, result], max_tokens: 8 });
});
