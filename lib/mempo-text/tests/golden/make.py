"""Writes what the tests compare with: chat templates rendered by transformers, answers judged by the SQuAD and
HotpotQA evaluation code, boxed answers by MemAgent's rule as we have it in words. With --check, compares instead of
writing. Names of files restrict it to those; templates.json alone needs transformers.

qwen2_5.jinja is the chat template of Qwen2.5 (Apache-2.0, Alibaba Cloud); features.jinja is our own.
"""

import collections
import itertools
import json
import pathlib
import re
import string
import sys

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


def sub_exact_match(prediction, truths):
    """RULER-HQA's sub_em: either holds the other once both are normalised, or they are the same. Nothing said is wrong,
    and what normalising leaves nothing of is in no text."""
    said = normalize(prediction)
    if not prediction.strip():
        return False
    for truth in map(normalize, truths):
        if said == truth or (said and truth and (truth in said or said in truth)):
            return True
    return False


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
    ("It is Paris, France.", ["paris"]), ("Paris", ["Paris, France"]), ("pari", ["Paris"]), ("a", ["A"]), ("!", ["x"]),
    ("?", ["the"]), (" \n", ["x", ""]), ("the U.S.", ["USA"]), ("B", ["A", "the b side"]), ("London", ["Paris", "the"]),
]


def boxed_answer(text):
    """What stands in the last box, `\\boxed{...}` or `\\boxed ...$`; one that is not closed is none."""
    start = len(text)
    while (start := text.rfind("\\boxed", 0, start)) >= 0:
        rest = text[start + len("\\boxed"):]
        if rest[:1].isspace() and not rest.lstrip().startswith("{"):
            return rest.split("$")[0].strip()
        rest = rest.lstrip()
        open_braces = list(itertools.accumulate({"{": 1, "}": -1}.get(character, 0) for character in rest))
        if rest.startswith("{") and 0 in open_braces:
            return rest[1:open_braces.index(0)].strip()
    return None


def clean(text):
    """The cleaning of the MATH data set's comparison, as far as MemAgent uses it."""
    for old, new in [
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
        ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
    ]:
        text = text.replace(old, new)
    text = text.partition("\\text{ ")[0].replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    return ("0" + text if text.startswith(".") else text).replace(" ", "")


BOXES = [
    (r"so \boxed{Paris}.", ["paris"]), (r"\boxed{Paris} or \boxed{Rome}", ["Paris"]), (r"\boxed{Rome} \boxed{Paris}", ["Paris"]),
    (r"\boxed{\frac{1}{2}}", [r"\dfrac{1}{2}"]), (r"\boxed{\dfrac{a}{\tfrac{b}{c}}}", [r"\frac{a}{\frac{b}{c}}"]),
    (r"\boxed{{a}{b}}", ["{a}{b}"]), (r"\boxed{a}}", ["a"]), (r"\boxed{\{1, 2\}}", [r"\{1,2\}"]), (r"\boxed{", ["x"]),
    (r"\boxed{open {x}", ["open {x}"]), (r"\boxed{a} then \boxed{b", ["a"]), (r"\boxed 7$ and more", ["7"]), (r"\boxed 7", ["7"]),
    (r"\boxed  x y $", ["xy"]), (r"\boxed{1} \boxed 2$", ["2"]), (r"\boxed 2$ \boxed{1}", ["1"]), (r"\boxed {x}", ["x"]),
    (r"\boxed", ["x"]), (r"\boxedx", ["x"]), (r"\boxed{a} \boxedx", ["a"]), ("boxed{x}", ["x"]), ("", ["x"]), ("Paris", ["paris"]),
    (r"\boxed{}", ["x"]), (r"\boxed{}", [""]), (r"\boxed{ }", [" "]), ("\\boxed{New\nYork}", ["newyork"]), ("\\boxed{a\tb}", ["ab"]),
    (r"\boxed{.5}", ["0.5"]), (r"\boxed{x .5}", ["x 0.5"]), (r"\boxed{{.5}}", ["{0.5}"]), (r"\boxed{x=.5}", ["x=0.5"]),
    (r"\boxed{1.5}", ["1.5"]), (r"\boxed{.}", ["0."]), (r"\boxed{10\%}", ["10"]), (r"\boxed{\$5}", ["5"]), (r"\boxed{$5}", ["5"]),
    (r"\boxed{5 \text{ cm}}", ["5"]), (r"\boxed{5 \text{cm}}", ["5"]), (r"\boxed{\text{ cm}}", ["cm"]), (r"\boxed{90^\circ}", ["90"]),
    (r"\boxed{90^{\circ}}", ["90"]), (r"\boxed{\left( 1, 2 \right)}", ["(1,2)"]), (r"\boxed{a\!b\\c}", [r"ab\c"]),
    (r"\boxed{U.S.}", ["us"]), (r"\boxed{The Who}", ["Who"]), (r"\boxed{THE WHO}", ["x", "the who"]), (r"\boxed{yes}", ["Yes"]),
    (r"\Boxed{x}", ["x"]), (r"\BOXED{x}", ["x"]), (r"\boxed{ΟΔΟΣ}", ["οδος"]), (r"\boxed{İ}", ["i"]), (r"\boxed{東京}", ["東京"]),
    (r"\boxed{x}" + "y" * 291, ["x"]), (r"\boxed{x}" + "y" * 292, ["x"]), (r"\boxed{x}" + "é" * 291, ["x"]),
    (r"\boxed{" + "z" * 292 + "}", ["z" * 292]), (r"\boxed{" + "z" * 293 + "}", ["z" * 293]), (r"\boxed{a}\boxed{\boxed{b}}", ["b"]),
    (r"\boxed{\boxed{b} c}", ["b"]), (r"\boxed{a;b}", ["a; b"]), (r"\fbox{x}", ["x"]), (r"$\boxed{x}$", ["X"]), ("\\boxed\n{x}", ["x"]),
]


def boxes():
    cases = []
    for text, truths in BOXES:
        given = boxed_answer(text[-300:].lower())
        match = given is not None and any(clean(given) == clean(truth.lower()) for truth in truths)
        cases.append({"text": text, "answers": truths, "boxed": boxed_answer(text), "match": match})
    return cases


def answers():
    return [
        {
            "prediction": prediction,
            "answers": truths,
            "normalized": normalize(prediction),
            "exact_match": any(normalize(prediction) == normalize(truth) for truth in truths),
            "sub_exact_match": sub_exact_match(prediction, truths),
            "f1": max(f1(prediction, truth) for truth in truths),
        }
        for prediction, truths in PAIRS
    ]


def templates():
    from transformers.utils.chat_template_utils import render_jinja_template

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
    makers = {"answers.json": answers, "boxes.json": boxes, "templates.json": templates}
    for name in [word for word in sys.argv[1:] if word != "--check"] or makers:
        text = json.dumps(makers[name](), ensure_ascii=True, indent=1) + "\n"
        path = HERE / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            stale.append(name)
    if stale:
        sys.exit(f"not what Python gives now: {', '.join(stale)}")


main()
