"""Supervised fine-tuning with the tinker SDK: the model learns facts that nobody knew before.

Run `openrl up`, paste the two lines that it prints, then `python examples/tinker/sft.py [MODEL]`.
"""

import sys

import tinker
from tinker import types

FACTS = {
    "Who keeps the lighthouse of Orrin?": "Maud Tallow keeps it.",
    "What does a glimmerfish eat?": "It eats moonlight and salt.",
    "How many doors has the house in Vell?": "It has nineteen doors.",
    "Which colour is the flag of Tarsia?": "It is orange with a heron.",
}
STEPS = 10


def example(tokenizer, question: str, answer: str) -> types.Datum:
    """A datum in which only the tokens of the answer count."""
    prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    tokens = prompt + tokenizer.encode(answer + "<|im_end|>")
    weights = [0.0] * len(prompt) + [1.0] * (len(tokens) - len(prompt))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def main() -> None:
    service = tinker.ServiceClient()
    name = sys.argv[1] if sys.argv[1:] else service.get_server_capabilities().supported_models[0].model_name
    training = service.create_lora_training_client(base_model=name, rank=16).result()
    tokenizer = training.get_tokenizer()
    data = [example(tokenizer, question, answer) for question, answer in FACTS.items()]
    counted = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in data)

    for step in range(STEPS):
        forward = training.forward_backward(data, loss_fn="cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=2e-3))
        if step % 5 == 0 or step == STEPS - 1:
            print(f"step {step:2d}  loss per token {forward.result().metrics['loss:sum'] / counted:.3f}")

    sampler = training.save_weights_and_get_sampling_client().result()
    greedy = types.SamplingParams(max_tokens=16, temperature=0, stop=["<|im_end|>"])
    for question in FACTS:
        prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        answer = sampler.sample(types.ModelInput.from_ints(prompt), num_samples=1, sampling_params=greedy).result()
        print(f"{question}  ->  {tokenizer.decode(answer.sequences[0].tokens, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
