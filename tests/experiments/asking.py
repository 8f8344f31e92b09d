"""A question to ask, and what came of it."""

from hooked_vlm.data import Sample, shapes, span_of

QUESTION = "what color is the red circle ?"
CIRCLE = span_of(QUESTION, "circle")


def asked(question=QUESTION, **facts) -> Sample:
    return Sample("a", shapes(1, seed=7)[0].image, question, **facts)


def words_at(inputs, name, row=0) -> list[str]:
    return [inputs.tokens[row][position] for position in inputs.spans[name][row]]
