"""Reinforcement learning with the tinker SDK: the model learns to add two-digit numbers without a carry.

Run `openrl up`, paste the two lines that it prints, then `python examples/tinker/rl.py [MODEL]`.
"""

import random
import sys

import tinker
from tinker import types

STEPS, TASKS, SAMPLES = 12, 8, 8
ASK = "<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n{a} + {b} ="


def task(numbers: random.Random) -> tuple[int, int]:
    """Two numbers without a carry."""
    tens, ones = numbers.randint(2, 9), numbers.randint(0, 9)
    a, b = numbers.randint(1, tens - 1), numbers.randint(0, ones)
    return 10 * a + b, 10 * (tens - a) + ones - b


def datum(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """What was sampled, with the log-probabilities with which it was, and how much better than its group it did."""
    tokens, before = list(sequence.tokens), [0.0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": prompt[1:] + tokens,
        "logprobs": before + list(sequence.logprobs),
        "advantages": before + [advantage] * len(tokens),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(prompt + tokens[:-1]), loss_fn_inputs=inputs)


def main() -> None:
    service, numbers = tinker.ServiceClient(), random.Random(0)
    name = sys.argv[1] if sys.argv[1:] else service.get_server_capabilities().supported_models[0].model_name
    training = service.create_lora_training_client(base_model=name, rank=16).result()
    tokenizer, how = training.get_tokenizer(), types.SamplingParams(max_tokens=6, temperature=1.0)

    for step in range(STEPS):
        sampler = training.save_weights_and_get_sampling_client().result()
        tasks = [task(numbers) for _ in range(TASKS)]
        prompts = [tokenizer.encode(ASK.format(a=a, b=b)) for a, b in tasks]
        groups = [sampler.sample(types.ModelInput.from_ints(prompt), SAMPLES, how) for prompt in prompts]
        data, rewards = [], []
        for (a, b), prompt, group in zip(tasks, prompts, groups, strict=True):
            sequences = group.result().sequences
            texts = [tokenizer.decode(s.tokens, skip_special_tokens=True).strip() for s in sequences]
            scores = [float(text.rstrip(".") == str(a + b)) for text in texts]
            mean = sum(scores) / SAMPLES
            data += [datum(prompt, s, r - mean) for s, r in zip(sequences, scores, strict=True) if r != mean]
            rewards.append(mean)
        print(f"step {step:2d}  reward {sum(rewards) / TASKS:.3f}  sequences {len(data)}", flush=True)
        if data:
            training.forward_backward(data, loss_fn="importance_sampling")
            training.optim_step(types.AdamParams(learning_rate=4e-4)).result()


if __name__ == "__main__":
    main()
