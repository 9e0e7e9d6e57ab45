import flame
import asyncio

async def main():
    # Create a session with initial context
    session = await flame.create_session(
        "openai-agent",
        b"You are a weather forecaster."
    )
    
    # Send a task to the same session
    task1 = await session.invoke(b"Who are you?")
    print(task1.output.decode("utf-8"))

if __name__ == "__main__":
    asyncio.run(main())
