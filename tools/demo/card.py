"""The demo model's README.md, written from training.json so that the two cannot disagree."""

from typing import Any

# Paragraphs are single lines: filled-in numbers would spoil any wrapping.
PARAGRAPHS = (
    "# Demo model",
    "A Llama of {parameters:.1f} M parameters (bf16), trained on the Python standard library. It is here so that "
    "every machine can run the launcher, and so that tests have weights in which a wrong shard shows as a worse loss.",
    "| on {held_out[num_tokens]} held-out tokens | nats per token | bits per byte | perplexity |\n"
    "|---|--:|--:|--:|\n"
    "| this model, as saved in bf16 "
    "| {model[nats_per_token]:.3f} | {model[bits_per_byte]:.3f} | {model[perplexity]:.1f} |\n"
    "| trigram, {trigram[smoothing]} "
    "| {trigram[nats_per_token]:.3f} | {trigram[bits_per_byte]:.3f} | {trigram[perplexity]:.1f} |",
    "Both rows: same tokenizer, same training and held-out tokens. The model is scored in windows of "
    "{held_out[window]} tokens with nothing carried over. Held out are whole files, chosen by a hash of their path. "
    "The checkpoint with the lowest held-out loss was kept, which flatters the model a little; library modules "
    "resemble each other, which helps both rows.",
    "**Text.** The sources of the standard library of Python {corpus[python]}, with its tests where it has them: "
    "{corpus[num_files]} files, {megabytes:.1f} MB, without installed packages, code-page tables and build records. "
    "Copyright (c) 2001 and later, Python Software Foundation; all rights reserved. They are under the "
    "[PSF licence](https://docs.python.org/3/license.html), version 2, and so is what this model repeats of them.",
    "**Tokenizer.** Byte-level BPE of 4096 entries, trained on the training files; any text round-trips. `<|bos|>` "
    "goes in front of every text, `<|eos|>` ends a file. There is no chat template.",
    "**Training.** {training[steps]} steps of {training[batch]} x {training[sequence]} tokens, "
    "{training[epochs]:.1f} epochs, {training[seconds]:.0f} s on {device} (torch {versions[torch]}, transformers "
    "{versions[transformers]}): AdamW, cosine from {training[lr]}, weight decay {training[weight_decay]}. "
    "`training.json` holds every number. Held-out loss was lowest at step {training[best_step]}, and that is "
    "what is here. The same command gives other weights of about the same quality elsewhere:",
    "    {command}",
    "**Not good for** anything but demonstrations and tests. It writes what looks like Python and seldom runs; it "
    "knows no facts, follows no instructions, can repeat library code word for word, and ends at 1024 tokens.",
)


def model_card(facts: dict[str, Any]) -> str:
    """Markdown for `facts`, the content of training.json."""
    parameters, megabytes = facts["num_parameters"] / 1e6, facts["corpus"]["num_bytes"] / 1e6
    return "\n\n".join(PARAGRAPHS).format(**facts, parameters=parameters, megabytes=megabytes) + "\n"
