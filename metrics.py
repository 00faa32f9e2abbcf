"""The official metric of each benchmark, as functions of text alone: what was answered, and what is right.

Where it sits: under benchmarks.py. GSM8K and BBH as lm-evaluation-harness reads their answers (gsm8k_cot,
bbh_cot_fewshot), LongBench as its own eval.py, MT-Bench as FastChat's llm_judge, the needle as RULER. Where the
original has an edge that looks like a slip it is kept, and said so: figures are compared with published ones.

LongBench needs `rouge` (its scorer's own library: rouge-score's ROUGE-L has other values), `jieba` for Chinese words
and `rapidfuzz` for the similarity of code.
"""

import importlib
import re
import string
from collections import Counter

ENGLISH = set(string.punctuation)
CHINESE = ENGLISH | set(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def need(package: str):
    """A library that only some metrics use; ValueError names it where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"this metric needs the package {package}, which is not here: pip install {package}") from None


# ---- GSM8K, BBH, needle, MT-Bench ------------------------------------------------------------------------------------


def gsm8k_target(answer: str) -> str:
    """The number behind the four hashes."""
    return answer.split("####")[-1].strip()


def gsm8k_score(given: str, target: str) -> dict[str, bool]:
    """strict: the number after "The answer is"; flexible: the last number there is."""
    strict = re.search(r"The answer is (\-?[0-9\.\,]+).", given)
    numbers = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", given)
    right = _plain_number(target)
    return {
        "strict": strict is not None and _plain_number(strict[1]) == right,
        "flexible": bool(numbers) and _plain_number(numbers[-1][0] or numbers[-1][1]) == right,
    }


def _plain_number(text: str) -> str:
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text.strip())).lower()


def bbh_score(given: str, target: str) -> bool:
    """What stands after the first "the answer is", less the last character of its line (a full stop, as a rule)."""
    found = re.search(r"(?<=the answer is )(.*)(?=.)", given)
    return found is not None and found[1].strip() == target


def needle_score(given: str, value: str) -> bool:
    return value.lower() in given.lower()


def judge_rating(reply: str) -> float | None:
    """The rating in a judge's reply, [[7]] or else [7]; None where there is none."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply) or re.search(r"\[(\d+\.?\d*)\]", reply)
    return float(found[1]) if found else None


# ---- LongBench -------------------------------------------------------------------------------------------------------


def qa_f1(given: str, truth: str, classes=None) -> float:
    """F1 of the bags of words, without case, punctuation and articles."""
    return _f1(*(_words(text) for text in (given, truth)))


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in ENGLISH)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def qa_f1_zh(given: str, truth: str, classes=None) -> float:
    """F1 of the bags of jieba's words, without case, punctuation and space."""
    return _f1(*(_words_zh(text) for text in (given, truth)))


def _words_zh(text: str) -> list[str]:
    bare = ("".join(letter for letter in word.lower() if letter not in CHINESE) for word in cut_chinese(text))
    return [word for word in ("".join(word.split()) for word in bare) if word]


def cut_chinese(text: str) -> list[str]:
    jieba = need("jieba")
    jieba.setLogLevel("ERROR")  # it reports its dictionary on standard error
    return list(jieba.cut(text, cut_all=False))


def _f1(given: list[str], truth: list[str]) -> float:
    same = sum((Counter(given) & Counter(truth)).values())
    if not same:
        return 0.0
    precision, recall = same / len(given), same / len(truth)
    return 2 * precision * recall / (precision + recall)


def rouge_l(given: str, truth: str, classes=None) -> float:
    rouge = need("rouge").Rouge()
    try:
        return rouge.get_scores([given], [truth], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):  # an empty text, or one too long for it: 0, as there
        return 0.0


def rouge_l_zh(given: str, truth: str, classes=None) -> float:
    return rouge_l(*(" ".join(cut_chinese(text)) for text in (given, truth)))


def classification(given: str, truth: str, classes: list[str]) -> float:
    """1 over the number of classes named, if the right one is among them."""
    named = [name for name in classes if name in given]
    for name in named:  # parts of the right name do not count; the original, too, skips the one after a removed one
        if name in truth and name != truth:
            named.remove(name)
    return 1 / len(named) if truth in named else 0.0


def count(given: str, truth: str, classes=None) -> float:
    """The share of the right number among all numbers in the answer."""
    numbers = re.findall(r"\d+", given)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def retrieval(given: str, truth: str, classes=None) -> float:
    return count(given, re.search(r"Paragraph (\d+)", truth)[1])


def retrieval_zh(given: str, truth: str, classes=None) -> float:
    return count(given, re.search(r"段落(\d+)", truth)[1])


def code_similarity(given: str, truth: str, classes=None) -> float:
    """Similarity of the first line that is neither comment nor fence, in whole percents as fuzzywuzzy gives them."""
    lines = given.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not truth:
        return float(line == truth)
    return round(need("rapidfuzz").fuzz.ratio(line, truth)) / 100


LONGBENCH = {
    "narrativeqa": qa_f1, "qasper": qa_f1, "multifieldqa_en": qa_f1, "multifieldqa_zh": qa_f1_zh,
    "hotpotqa": qa_f1, "2wikimqa": qa_f1, "musique": qa_f1, "dureader": rouge_l_zh,
    "gov_report": rouge_l, "qmsum": rouge_l, "multi_news": rouge_l, "vcsum": rouge_l_zh,
    "trec": classification, "triviaqa": qa_f1, "samsum": rouge_l, "lsht": classification,
    "passage_count": count, "passage_retrieval_en": retrieval, "passage_retrieval_zh": retrieval_zh,
    "lcc": code_similarity, "repobench-p": code_similarity,
}  # fmt: skip
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # few-shot: a model goes on with more examples


def longbench_score(dataset: str, given: str, answers: list[str], classes: list[str] | None) -> float:
    """The best score over the right answers."""
    if dataset in FIRST_LINE:
        given = given.lstrip("\n").split("\n")[0]
    return max((LONGBENCH[dataset](given, answer, classes) for answer in answers), default=0.0)
