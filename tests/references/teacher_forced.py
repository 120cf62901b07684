"""The published teacher-forced score once more: one text at a time, no padding, transformers alone."""

import torch


def forced_predictions(model, tokenizer, prompt, target, **arguments):
    """What a model predicts at each answer token, and those tokens; `arguments` go to every call."""
    n_prompt = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + " " + target, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids, **arguments).logits
    predicted = []
    for position in range(n_prompt - 1, ids.shape[1] - 1):
        scores = logits[0, position]
        best = 0
        for token in range(len(scores)) if len(scores) < 1000 else [int(scores.argmax())]:
            if scores[token] > scores[best]:
                best = token
        predicted.append(best)
    return predicted, ids[0, n_prompt:].tolist()


def token_accuracy(predicted, answer):
    right = 0
    for one, other in zip(predicted, answer, strict=True):
        right += one == other
    return right / len(answer)


def answer_logprobs(model, tokenizer, prompt, target, **arguments):
    n_prompt = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + " " + target, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = torch.softmax(model(ids, **arguments).logits[0], -1)
    return [float(probabilities[i - 1, ids[0, i]].log()) for i in range(n_prompt, ids.shape[1])]


def greedy_reply(model, prompt_ids, stops, n):
    """Token by token, the whole text anew each time; the token that ends it included."""
    ids, reply = list(prompt_ids), []
    while len(reply) < n:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), n_prompt_tokens=torch.tensor([len(prompt_ids)])).logits
        reply.append(int(logits[0, -1].argmax()))
        ids.append(reply[-1])
        if reply[-1] in stops:
            break
    return reply
