"""Loads an exported model with transformers alone and lets it go on from a few words.

python generate.py FOLDER [PROMPT]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, prompt = sys.argv[1], (sys.argv[2:] or ["This film is"])[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.manual_seed(0)
    words = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(
        words.input_ids, max_new_tokens=40, do_sample=True, top_k=40, pad_token_id=tokenizer.eos_token_id
    )
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
