"""Chat with a server through the openai package. First: martlet deploy --model_type smollm2-135m-instruct"""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", default="8000")
port = parser.parse_args().port

client = OpenAI(
    api_key="EMPTY",
    base_url=f"http://localhost:{port}/v1",
)
model_type = client.models.list().data[0].id
print(f"model_type: {model_type}")

query = "浙江的省会在哪里?"
messages = [{"role": "user", "content": query}]
# max_tokens: a small model does not always find an end.
resp = client.chat.completions.create(model=model_type, messages=messages, seed=42, max_tokens=256)
response = resp.choices[0].message.content
print(f"query: {query}")
print(f"response: {response}")

# Streaming
messages.append({"role": "assistant", "content": response})
query = "这有什么好吃的?"
messages.append({"role": "user", "content": query})
stream_resp = client.chat.completions.create(model=model_type, messages=messages, stream=True, seed=42, max_tokens=256)

print(f"query: {query}")
print("response: ", end="")
for chunk in stream_resp:
    print(chunk.choices[0].delta.content, end="", flush=True)
print()
