"""Chat with a server through SWIFT's names. First: martlet deploy --model_type smollm2-135m-instruct"""

import argparse

from martlet.swift import XRequestConfig, get_model_list_client, inference_client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", default="8000")
port = parser.parse_args().port

model_list = get_model_list_client(port=port)
model_type = model_list.data[0].id
print(f"model_type: {model_type}")

query = "浙江的省会在哪里?"
request_config = XRequestConfig(seed=42, max_tokens=256)  # a small model does not always find an end
resp = inference_client(model_type, query, request_config=request_config, port=port)
response = resp.choices[0].message.content
print(f"query: {query}")
print(f"response: {response}")

history = [(query, response)]
query = "这有什么好吃的?"
request_config = XRequestConfig(stream=True, seed=42, max_tokens=256)
stream_resp = inference_client(model_type, query, history, request_config=request_config, port=port)
print(f"query: {query}")
print("response: ", end="")
for chunk in stream_resp:
    print(chunk.choices[0].delta.content, end="", flush=True)
print()
