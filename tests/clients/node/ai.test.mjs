// The AI SDK over its OpenAI provider's models, of Responses (the default) and chat, and over its OpenAI-compatible one:
// text, objects, tools, streams.
import assert from "node:assert/strict";
import test from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = `${process.env.SERVER_URL}/v1`;
const name = process.env.SERVER_MODEL;
const compatible = createOpenAICompatible({
  name: "lorakeet", baseURL, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: "none" });
const models = { responses: openai(name), chat: openai.chat(name), compatible: compatible(name) };
const Bird = z.object({ colour: z.enum(["red", "green"]), wings: z.number().int().min(0).max(9) });
const report = tool({ description: "Report a bird.", inputSchema: Bird, execute: async () => "done" });

for (const [provider, model] of Object.entries(models)) {
  const ask = { model, prompt: "Name a bird.", maxRetries: 0 };

  test(`generateText and streamText, ${provider}`, async () => {
    const whole = await generateText({ ...ask, maxOutputTokens: 8, temperature: 0 });
    const stream = streamText({ ...ask, maxOutputTokens: 8, temperature: 0 });
    assert.equal(await stream.text, whole.text);
    assert.ok((await stream.usage).outputTokens > 0);
  });

  test(`generateObject, ${provider}`, async () => {
    Bird.parse((await generateObject({ ...ask, schema: Bird, maxOutputTokens: 60 })).object);
  });

  test(`tools, ${provider}`, async () => {
    const answer = await generateText({
      ...ask, tools: { report }, toolChoice: "required", maxOutputTokens: 150,
      ...(provider !== "compatible" ? { providerOptions: { openai: { parallelToolCalls: false } } } : {}),
    });
    assert.equal(answer.toolCalls[0].toolName, "report");
  });
}
