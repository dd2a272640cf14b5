"""The plain-text mathematics of theory/*.md as TeX, and TeX as MathML, which browsers show without any script.

The pages are written to be read as they are, in a terminal: `|s - c| <= gamma_k sum |a_i b_i|`. The site sets the same
formulas. Nothing is rearranged: a slash stays a slash, so what is read there is what stands here. docutils makes
MathML of TeX; this file is a Sphinx extension.
"""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

__all__ = ["is_math", "setup", "to_tex"]

GREEK = {name: rf"\{name}" for name in ("alpha", "gamma", "delta", "eta", "kappa", "mu", "nu", "omega", "phi", "pi")}
GREEK |= {"eps": r"\varepsilon", "rho": r"\rho", "sigma": r"\sigma", "Gamma": r"\Gamma"}
FUNCTIONS = {"exp", "log", "max", "min", "cosh", "sinh", "tanh"}
UPRIGHT = {"fl", "sign", "dist", "softmax", "mean", "dim", "dot", "margin", "lead", "high", "low", "unit", "budget"}
UPRIGHT |= {"first", "last", "quotient", "computed", "exact"}
SHORT_WORDS = {"at", "by", "is", "of", "or", "so", "to"}
SIGNS = {"<=": r"\le ", ">=": r"\ge ", "->": r"\to ", "<-": r"\leftarrow ", "+-": r"\pm ", "..": r"\ldots "}
SIGNS |= {"*": r"\times ", "{": r"\{", "}": r"\}"}
BRACKETS = {"ceil": (r"\lceil ", r"\rceil "), "floor": (r"\lfloor ", r"\rfloor "), "sqrt": (r"\sqrt{", "}")}
LONG = 30  # characters: what may be wider than a telephone
FILE_OR_COMMAND = re.compile(r"\.(py|cpp|md)\b|^--?[a-z]|^python |kvcluster|torch|scipy|check_|test_")
NAME = re.compile(r"[A-Za-z_][\w.]*")
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<hyper>2F1)|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<hyphened>[A-Za-z]{2,}(?:-[a-z]{2,})+)"
    r"|(?P<word>[A-Za-z]+\d*)|(?P<script>[_^])|(?P<sign><=|>=|->|<-(?= )|\+-|\.\.|[-+=<>*/.,:;!'|()\[\]{}])"
)


def is_math(span: str) -> bool:
    """Whether a code span of a theory page is a formula, and not the name of a function, an argument or a file."""
    if FILE_OR_COMMAND.search(span) or not re.search(r"\w", span):
        return False
    if not NAME.fullmatch(span):
        return True
    base = re.match(r"[A-Za-z]*", span)[0]
    return len(base) == 1 or base in GREEK or base in FUNCTIONS or base in UPRIGHT


def to_tex(text: str) -> str:
    """The TeX of a formula in plain text.

    Raises
    ------
    ValueError : a character that no formula has.
    """
    return Formula(text).translate()


class Formula:
    """One formula, read from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.is_in_bars = False

    def translate(self) -> str:
        parts = []
        while self.place < len(self.text):
            parts.append(self.next())
        if self.is_in_bars:
            raise ValueError(f"bars of a formula must be pairs, got {self.text}")
        tex = re.sub(r"\\,(?=\\(text|in|notin)\b)|(?<= })\\,|(?<=in )\\,", "", "".join(parts)).strip()
        return re.sub(r" \}(?=[,.])", "}", re.sub(r" \}\\text\{ ", " ", tex))

    def next(self) -> str:
        """TeX of the next token, with the brackets that belong to it."""
        before = self.text[: self.place]
        found = TOKEN.match(self.text, self.place)
        if found is None:
            raise ValueError(f"a formula cannot have {self.text[self.place]!r}, got {self.text}")
        self.place = found.end()
        part, after = found[0], self.text[self.place :]
        match found.lastgroup:
            case "space":
                return r"\quad " if len(part) > 1 else r"\," if joins(before, after) else " "
            case "hyper":
                return "{}_2F_1"
            case "number":
                mantissa, _, exponent = part.partition("e")
                return mantissa + (rf"\cdot 10^{{{exponent}}}" if exponent else "")
            case "hyphened":
                return rf"\text{{ {part} }}"
            case "word":
                return self.word(part)
            case "script":
                return part + self.script(part, before)
        if part == "|":
            self.is_in_bars = not self.is_in_bars
            return r"\left|" if self.is_in_bars else r"\right|"
        return sign(part, before, after)

    def word(self, word: str) -> str:
        letters = word.rstrip("0123456789")
        index = f"_{{{word[len(letters) :]}}}" if word != letters else ""
        if letters in BRACKETS:
            opening, closing = BRACKETS[letters]
            return f"{opening}{self.group()}{closing}"
        if letters in GREEK or letters in FUNCTIONS:
            return GREEK.get(letters, rf"\{letters}") + index + " "
        if letters in ("sum", "inf", "oo"):
            return r"\sum " if letters == "sum" else r"\infty "
        if letters == "in":
            return r"\in "
        if letters == "not" and self.text[self.place :].startswith(" in "):
            self.place += len(" in")
            return r"\notin "
        if letters in UPRIGHT:
            return rf"\mathrm{{{letters}}}{index}"
        is_prose = len(letters) > 2 or letters in SHORT_WORDS
        return rf"\text{{ {letters} }}" if is_prose else letters + index

    def script(self, kind: str, before: str) -> str:
        """What is raised or lowered: a bracket, or the sign, word or number that follows."""
        if self.text.startswith("(", self.place):
            is_order_statistic = kind == "_" and before.endswith("F")
            inside = self.group()
            return f"{{({inside})}}" if is_order_statistic else f"{{{inside}}}"
        minus = "-" if self.text.startswith("-", self.place) else ""
        self.place += len(minus)
        if kind == "_":
            found = re.compile(r"[A-Za-z0-9]+").match(self.text, self.place)
            self.place = found.end()
            is_prose = re.fullmatch(r"[a-z]{2,}", found[0]) and found[0] != "ij"
            return rf"{{\text{{{found[0]}}}}}" if is_prose else f"{{{found[0]}}}"
        return f"{{{minus}{self.next()}}}"

    def group(self) -> str:
        """TeX of what stands in the bracket that opens here, without the bracket."""
        depth, start = 0, self.place
        for place in range(start, len(self.text)):
            depth += (self.text[place] == "(") - (self.text[place] == ")")
            if depth == 0:
                self.place = place + 1
                return to_tex(self.text[start + 1 : place])
        raise ValueError(f"a bracket of a formula must be closed, got {self.text}")


def joins(before: str, after: str) -> bool:
    """Whether a space stands for a product: between an operand's end and another's beginning."""
    return bool(re.search(r"[\w)\]|'!*,]$", before) and re.match(r"[\w(\[|]", after))


def sign(part: str, before: str, after: str) -> str:
    is_open = before[-1:] in ("", " ", "(")
    if part == "." and re.match(r"[\w( ]", after) and (before.endswith(" ") or not after.startswith(" ")):
        return r"\cdot "
    if part == "*" and not before.endswith(" ") and not re.match(r"[\w(]", after):
        return "*" if is_open else "^*"
    if part == "<" and is_open and after[:1].isalpha():
        return r"\langle "
    if part == ">" and not before.endswith(" "):
        return r"\rangle "
    return SIGNS.get(part, part)


def display(block: str) -> str:
    """TeX of an indented block: lines below each other, what stands far apart in columns."""
    rows = [[to_tex(cell) for cell in re.split(r" {3,}", line.strip())] for line in block.splitlines()]
    if len(rows) == 1:
        return r"\qquad ".join(rows[0])
    return r"\begin{matrix}" + r"\\ ".join(" & ".join(row) for row in rows) + r"\end{matrix}"


def set_formulas(app: Sphinx, document: nodes.document) -> None:
    """Formulas instead of code spans and indented blocks, on the pages of theory/."""
    if not app.env.docname.startswith("theory/") or app.env.docname.endswith((".py", "README")):
        return
    for span in list(document.findall(nodes.literal)):
        if is_math(span.astext()):
            span.replace_self(nodes.math(span.astext(), to_tex(span.astext())))
    for block in list(document.findall(nodes.literal_block)):
        if block.get("language") in (None, "none", "default") and is_math(block.astext()):
            block.replace_self(nodes.math_block(block.astext(), display(block.astext())))


def visit_math(translator, node: nodes.math) -> None:
    formula = tex2mathml(node.astext(), as_block=False)
    translator.body.append(f'<span class="long formula">{formula}</span>' if len(node.rawsource) > LONG else formula)
    raise nodes.SkipNode


def visit_math_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", set_formulas)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
