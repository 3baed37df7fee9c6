// LangChain for JavaScript over chat, Responses and Messages: messages, streams, structured output, tools.
import assert from "node:assert/strict";
import test from "node:test";
import { ChatAnthropic } from "@langchain/anthropic";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";

const shared = { model: process.env.SERVER_MODEL, apiKey: "none", maxTokens: 60, maxRetries: 0 };
const configuration = { baseURL: `${process.env.SERVER_URL}/v1` };
const models = {
  chat: new ChatOpenAI({ ...shared, configuration }),
  responses: new ChatOpenAI({ ...shared, configuration, useResponsesApi: true }),
  messages: new ChatAnthropic({ ...shared, anthropicApiUrl: process.env.SERVER_URL }),
};
const Bird = z.object({ red: z.boolean() }); // Anthropic's client asks for no more than types
const report = tool(async () => "done", { name: "report", description: "Report a bird.", schema: Bird });
const ask = new HumanMessage("Name a bird.");

for (const [name, model] of Object.entries(models)) {
  test(`a message, whole and streamed, ${name}`, async () => {
    assert.ok((await model.invoke([ask])).usage_metadata.output_tokens > 0);
    let total;
    for await (const chunk of await model.stream([ask])) total = total ? total.concat(chunk) : chunk;
    assert.ok(total.usage_metadata.output_tokens > 0);
  });

  test(`structured output, ${name}`, async () => {
    for (const method of ["jsonSchema", "functionCalling"])
      Bird.parse(await model.withStructuredOutput(Bird, { method }).invoke([ask]));
  });

  test(`tools, ${name}`, async () => {
    const answer = await model.bindTools([report], { tool_choice: "report", parallel_tool_calls: false }).invoke([ask]);
    const [call] = answer.tool_calls;
    Bird.parse(call.args);
    const result = new ToolMessage({ content: "done", tool_call_id: call.id });
    await model.bindTools([report]).invoke([ask, answer, result]);
  });
}
