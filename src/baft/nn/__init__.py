"""The mathematics of an intervention: tensors in, tensors out; no host, no tokenizer."""
