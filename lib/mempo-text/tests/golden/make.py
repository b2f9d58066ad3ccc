"""Writes what the tests compare with: chat templates rendered by transformers, answers judged by the SQuAD and
HotpotQA evaluation code. With --check, compares instead of writing.

qwen2_5.jinja is the chat template of Qwen2.5 (Apache-2.0, Alibaba Cloud); features.jinja is our own.
"""

import collections
import json
import pathlib
import re
import string
import sys

from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
CONVERSATIONS = [
    [("user", "Who?")],
    [("system", "Be brief."), ("user", "Who? \n")],
    [("system", ""), ("user", "")],
    [("system", " a\n"), ("user", "x"), ("assistant", "<think>t</think>\n\n y "), ("user", "{\"é\": \"<&>'\u2028\"}")],
    [("user", "1"), ("assistant", "2"), ("assistant", "3"), ("user", "4"), ("user", "5"), ("assistant", "6")],
    [("user", "{{ messages }}{% raw %}"), ("assistant", "{tab\t\\ \x07}"), ("system", "late")],
]


def normalize(text):
    """SQuAD's normalize_answer."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction, truth):
    """HotpotQA's f1_score."""
    prediction, truth = normalize(prediction), normalize(truth)
    for one, other in ((prediction, truth), (truth, prediction)):
        if one in ("yes", "no", "noanswer") and one != other:
            return 0.0
    common = sum((collections.Counter(prediction.split()) & collections.Counter(truth.split())).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction.split()), common / len(truth.split())
    return 2 * precision * recall / (precision + recall)


PAIRS = [
    ("Paris", ["paris"]), ("The Paris", ["Paris, France", "paris"]), ("a an the", [""]), ("", [""]), ("", ["x"]),
    ("the", ["The Who"]), ("The Who", ["Who"]), ("U.S.A.", ["USA"]), ("u s a", ["U.S.A."]), ("it's", ["its"]),
    ("yes", ["Yes."]), ("yes it is", ["yes"]), ("no", ["no way"]), ("noanswer", ["no answer"]), ("No", ["no"]),
    ("b b b c", ["b c c d"]), ("b c", ["b", "c", "b c d"]), ("x y x", ["x x y"]), ("1,000", ["1000"]),
    ("1.5", ["15"]), ("a-b", ["ab"]), ("a b", ["b"]), ("A\u00a0b", ["b"]), ("x\u200by", ["xy"]), ("x\u3000y", ["x y"]),
    ("x\x1cy\x1fz", ["x y z"]), ("x\x85y", ["x y"]), ("ÀÉ", ["àé"]), ("Straße", ["STRASSE"]), ("İstanbul", ["istanbul"]),
    ("ΟΔΟΣ", ["οδος"]), ("ΣΑΣ.", ["σας"]), ("ǅ", ["ǆ"]), ("ﬁn", ["fin"]), ("a\u0301 b", ["b"]), ("the\u0301 b", ["b"]),
    ("an\u093e x", ["x"]), ("\u0301the x", ["x"]), ("a_b the_x", ["b x"]), ("_a_", ["a"]), ("the² x", ["x"]),
    ("a½", ["½"]), ("the一", ["一"]), ("一a一", ["一一"]), ("theⅣ", ["ⅳ"]), ("a①b", ["①b"]), ("ª a º", ["ª º"]),
    ("«the» x", ["«» x"]), ("“a” x", ["“” x"]), ("a–b", ["–b"]), ("…the…", ["……"]), ("a\u200db", ["b"]),
    ("‿a‿", ["‿‿"]), ("a\u203fb", ["b"]), ("$5", ["5"]), ("`x`", ["x"]), ("x+y=z", ["xyz"]), ("#1 ~2", ["1 2"]),
    ("\\the/", ["the"]), ("T-H-E", ["the"]), ("t.h.e x", ["x"]), ("An Apple a Day", ["apple day"]),
    ("ａｎ x", ["x"]), ("THE\tEND\r\n", ["end"]), ("\ufeffthe x", ["x"]), ("Ⓐ", ["ⓐ"]), ("𝐚 the", ["𝐚"]),
    ("東京 タワー", ["東京タワー"]), ("кот the кот", ["кот кот"]), ("عرب a", ["عرب"]), ("नमस्ते a", ["नमस्ते"]),
    ("x" * 300 + " the " + "y" * 300, ["x" * 300]), ("theatre a n", ["theatre n"]), ("Yes, No", ["no"]),
]


def answers():
    return [
        {
            "prediction": prediction,
            "answers": truths,
            "normalized": normalize(prediction),
            "exact_match": any(normalize(prediction) == normalize(truth) for truth in truths),
            "f1": max(f1(prediction, truth) for truth in truths),
        }
        for prediction, truths in PAIRS
    ]


def templates():
    cases = []
    for name in ("qwen2_5.jinja", "features.jinja"):
        source = (HERE / name).read_text()
        for conversation in CONVERSATIONS:
            for opening in (False, True):
                messages = [{"role": role, "content": content} for role, content in conversation]
                rendered, _ = render_jinja_template(
                    conversations=[messages], chat_template=source, tools=None, documents=None,
                    add_generation_prompt=opening, **SPECIAL_TOKENS,
                )
                cases.append({
                    "template": name, "special_tokens": SPECIAL_TOKENS, "messages": conversation,
                    "add_generation_prompt": opening, "expected": rendered[0],
                })
    return cases


def main():
    stale = []
    for name, cases in (("answers.json", answers()), ("templates.json", templates())):
        text = json.dumps(cases, ensure_ascii=True, indent=1) + "\n"
        path = HERE / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            stale.append(name)
    if stale:
        sys.exit(f"not what Python gives now: {', '.join(stale)}")


main()
