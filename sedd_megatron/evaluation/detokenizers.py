r"""Out of the spaced-out words of benchmark corpora, text as people write it: what zero-shot evaluations feed a model.

Each function applies its rules in order, to one document. The rules are those behind the zero-shot perplexities of
arXiv 2310.16834 (its code, data.py), and for scientific papers those of arXiv 2406.07524; a figure is only comparable
when all of them are applied, in that order. One published WikiText rule is left out: the slashes in its pattern,
/' [0-9]/, keep it from ever applying.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Detokenizer = Callable[[str], str]


@dataclass(frozen=True)
class Rule:
    """Replace every match of `pattern`, from left to right; `replacement` may name its groups."""

    pattern: str
    replacement: str

    def apply(self, text: str) -> str:
        """The text with the rule applied once."""
        return re.sub(self.pattern, self.replacement, text)


def wikitext(text: str) -> str:
    """WikiText 2 and 103: a row of the raw data set."""
    return _apply(WIKITEXT, text)


def penn_treebank(text: str) -> str:
    """Penn Treebank as prepared by Mikolov: lower case, N for numbers, <unk> for rare words."""
    return _apply(PENN_TREEBANK, text)


def billion_words(text: str) -> str:
    """One Billion Words: a sentence."""
    return _apply(BILLION_WORDS, text)


def lambada(text: str) -> str:
    """LAMBADA in the version published with GPT-2: plain quotation marks, and a line feed before the passage."""
    return "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip()


def scientific_papers(text: str) -> str:
    """PubMed and arXiv articles: the rules of WikiText, then those of One Billion Words."""
    return billion_words(wikitext(text))


def unchanged(text: str) -> str:
    """For corpora that are text already."""
    return text


def _apply(rules: Sequence[Rule], text: str) -> str:
    for rule in rules:
        text = rule.apply(text)
    return text


def _literal(found: str, replacement: str) -> Rule:
    return Rule(re.escape(found), replacement.replace("\\", r"\\"))


def _closed_up(opening: str, closing: str) -> Rule:
    """No blanks inside a pair of brackets or quotes."""
    first, last = re.escape(opening), re.escape(closing)
    return Rule(rf"{first}\s*([^{last}]*?)\s*{last}", rf"{opening}\1{closing}")


WIKITEXT = (
    _literal("s '", "s'"),
    _literal(" @-@ ", "-"),
    _literal(" @,@ ", ","),
    _literal(" @.@ ", "."),
    *(_literal(f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    _closed_up("(", ")"),
    _closed_up("[", "]"),
    _closed_up("{", "}"),
    _closed_up('"', '"'),
    _closed_up("'", "'"),
    # The longest first: these are the marks of headings.
    _literal("= = = =", "===="),
    _literal("= = =", "==="),
    _literal("= =", "=="),
    _literal(" \u00b0 ", "\u00b0"),
    _literal(" \n", "\n"),
    _literal("\n ", "\n"),
    _literal(" N ", " 1 "),
    _literal(" 's", "'s"),
)

PENN_TREEBANK = (
    _literal(" 's", "'s"),
    _literal("s ' ", "s' "),
    _literal(" n't", "n't"),
    _literal(" \n ", "\n"),
    _literal("\\/", "/"),
    # Twice: of two numbers in a row the second begins at the blank that the first one took.
    _literal(" N ", " 1 "),
    _literal(" N ", " 1 "),
    _literal("$ 1", "$1"),
    _literal("# 1", "#1"),
    _literal("<unk>", "?"),
)

BILLION_WORDS = (
    _literal("http : / / ", "http://"),
    _literal("https : / / ", "https://"),
    Rule(r" '(\w+)", r"'\1"),
    Rule(r" (\w+) \. ", r" \1. "),
    Rule(r" (\w+) \.$", r" \1."),
    _literal(" ? ", "? "),
    Rule(r" \?$", "?"),
    _literal(" ! ", "! "),
    Rule(r" !$", "!"),
    _literal(" , ", ", "),
    _literal(" : ", ": "),
    _literal(" ; ", "; "),
    _literal(" / ", "/"),
    Rule(r'" ([^"]+) "', r'"\1"'),
    Rule(r"' ([^']+) '", r"'\1'"),
    Rule(r"\( ([^()]+) \)", r"(\1)"),
    Rule(r"\[ ([^\[\]]+) \]", r"[\1]"),
    _literal("$ ", "$"),
    _literal("\u00a3 ", "\u00a3"),
)
