"""Let a server continue a text, through the openai package. First: martlet deploy --model_type smollm2-135m-instruct"""

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

query = "浙江 -> 杭州\n安徽 -> 合肥\n四川 ->"
kwargs = {"model": model_type, "prompt": query, "seed": 42, "temperature": 0.1, "max_tokens": 32}
resp = client.completions.create(**kwargs)
response = resp.choices[0].text
print(f"query: {query}")
print(f"response: {response}")

# Streaming
stream_resp = client.completions.create(stream=True, **kwargs)
print(f"query: {query}")
print("response: ", end="")
for chunk in stream_resp:
    print(chunk.choices[0].text, end="", flush=True)
print()
