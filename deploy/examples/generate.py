"""Load a quantized checkpoint in transformers and generate: `python deploy/examples/generate.py FOLDER "Once upon"`."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_babai.transformers  # noqa: F401 - without it from_pretrained refuses the checkpoint

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
