# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai",
#   "flame-engine",
# ]
# [tool.uv.sources]
# flame-engine = { path = "../../..", editable = true }
# ///

import os
import asyncio
import flame
from flame import FlameService, SessionContext, TaskContext, TaskOutput
from openai import OpenAI

class OpenAIAgent(FlameService):
    def __init__(self):
        self.client = None
        self.system_prompt = None

    async def on_session_enter(self, context: SessionContext):
        # Initialize OpenAI client once per session
        self.client = OpenAI(
            api_key=os.getenv("DEEPSEEK_API_KEY"),
            base_url=os.getenv("DEEPSEEK_BASE_URL", "https://api.deepseek.com")
        )
        self.system_prompt = context.common_data.decode("utf-8")

    async def on_task_invoke(self, context: TaskContext) -> TaskOutput:
        response = self.client.chat.completions.create(
            model="deepseek-chat",
            messages=[
                {"role": "system", "content": self.system_prompt},
                {"role": "user", "content": context.input.decode("utf-8")}
            ]
        )
        return TaskOutput(data=response.choices[0].message.content.encode("utf-8"))

    async def on_session_leave(self):
        # Clean up if needed
        pass

# Run the agent
if __name__ == "__main__":
    asyncio.run(flame.run(OpenAIAgent()))
