"""Serves a model directory by transformers as vLLM and SGLang do, to hold `mempo-rollout sample --server` to.

  .tools/python/bin/python tools/peers/serve.py MODEL vllm|sglang PORT NAME

Only what that program asks for, one request at a time, in fp32 on the CPU: a reference, not a server to work with.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, kind, port, name = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
loaded = {"model": AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), "weights": name}
lock = threading.Lock()


def alternatives(logprobs, count):
    values, ids = logprobs.topk(count)
    return list(zip(values.tolist(), ids.tolist()))


@torch.no_grad()
def complete(prompt, tokens, temperature, seed, stop, stop_ids, count):
    """Ids, log-probabilities at the temperature, the most probable tokens of each place, why it ended."""
    generator = torch.Generator().manual_seed(seed)
    ids, logprobs, tops, cache, inputs = [], [], [], None, torch.tensor([prompt])
    while len(ids) < tokens:
        output = loaded["model"](inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores = torch.log_softmax(output.logits[0, -1, : len(tokenizer)].double() / (temperature or 1.0), -1)
        chosen = scores.argmax() if temperature == 0 else torch.multinomial(scores.exp(), 1, generator=generator)[0]
        ids.append(int(chosen))
        logprobs.append(float(scores[chosen]))
        tops.append(alternatives(scores, count) if count else [])
        if ids[-1] in stop_ids:
            return ids, logprobs, tops, "stop", ids[-1]
        text = tokenizer.decode(ids)
        if found := next((end for end in stop if end in text), None):
            return ids, logprobs, tops, "stop", found
        inputs = chosen.reshape(1, 1)
    return ids, logprobs, tops, "length", None


def vllm(body):
    ids, logprobs, tops, finish, matched = complete(
        body["prompt"], body["max_tokens"], body["temperature"], body["seed"], body["stop"], body["stop_token_ids"], body["logprobs"]
    )
    named = [{f"token_id:{id}": value for value, id in top} for top in tops]
    choice = {"index": 0, "text": tokenizer.decode(ids), "token_ids": ids, "finish_reason": finish, "stop_reason": matched}
    return {"choices": [choice | {"logprobs": {"token_logprobs": logprobs, "top_logprobs": named}}]}


def sglang(body):
    sampling = body["sampling_params"]
    ids, logprobs, tops, finish, matched = complete(
        body["input_ids"], sampling["max_new_tokens"], sampling["temperature"], sampling["sampling_seed"],
        sampling["stop"], sampling["stop_token_ids"], body["top_logprobs_num"],
    )
    return {
        "text": tokenizer.decode(ids),
        "output_ids": ids,
        "meta_info": {
            "output_token_logprobs": [[value, id, None] for value, id in zip(logprobs, ids)],
            "output_top_logprobs": [[[value, id, None] for value, id in top] for top in tops],
            "finish_reason": {"type": finish, "matched": matched},
            "weight_version": loaded["weights"],
        },
    }


def update(body):
    loaded["model"] = AutoModelForCausalLM.from_pretrained(body["model_path"], dtype=torch.float32).eval()
    loaded["weights"] = body["weight_version"]
    return {"success": True, "message": "Succeeded to update model weights."}


GET = {"/v1/models": lambda: {"object": "list", "data": [{"id": name, "object": "model", "root": directory}]}}
POST = {"/v1/completions": lambda body: vllm(body) if body["model"] == name else None} if kind == "vllm" else {"/generate": sglang, "/update_weights_from_disk": update}
if kind == "sglang":
    GET["/get_model_info"] = lambda: {"model_path": directory, "weight_version": loaded["weights"]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, handlers, *arguments):
        if (handler := handlers.get(self.path)) is None:
            status, answer = 404, {"message": f"{self.path} is not here"}
        else:
            with lock:
                answer = handler(*arguments)
            status = 200 if answer else 404
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.reply(GET)

    def do_POST(self):
        self.reply(POST, json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def log_message(self, *arguments):
        pass


ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
