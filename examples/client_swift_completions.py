"""Let a server continue a text, through SWIFT's names. First: martlet deploy --model_type smollm2-135m-instruct"""

import argparse

from martlet.swift import XRequestConfig, get_model_list_client, inference_client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", default="8000")
port = parser.parse_args().port

model_list = get_model_list_client(port=port)
model_type = model_list.data[0].id
print(f"model_type: {model_type}")

query = "浙江 -> 杭州\n安徽 -> 合肥\n四川 ->"
request_config = XRequestConfig(max_tokens=32, temperature=0.1, seed=42)
# A base model needs no is_chat_request; the small model here is one that chats, so it is asked for plain text.
resp = inference_client(model_type, query, request_config=request_config, port=port, is_chat_request=False)
response = resp.choices[0].text
print(f"query: {query}")
print(f"response: {response}")

request_config.stream = True
stream_resp = inference_client(model_type, query, request_config=request_config, port=port, is_chat_request=False)
print(f"query: {query}")
print("response: ", end="")
for chunk in stream_resp:
    print(chunk.choices[0].text, end="", flush=True)
print()
