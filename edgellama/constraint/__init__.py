"""Output that must parse: JSON schema, regular expression, choice, grammar.

    constraint = make_constraint(tokenizer, eos_ids, vocab_size, json_schema={"type": "object"})
    sampler = Sampler(params, constraint=constraint)      # masks, and follows what is accepted

Modules: `core` (`Constraint`, over llguidance), `sources` (what a user gives, as a Lark grammar), `gbnf` (reads
llama.cpp's grammars), `gbnf_to_lark`.

llguidance (the extra `constrain`) is imported by the first `make_constraint`. Knows token bytes and logits; nothing of
models.
"""

from edgellama.constraint.core import Constraint, make_constraint

__all__ = ["Constraint", "make_constraint"]
