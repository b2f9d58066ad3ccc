"""Ids and targets of hand-made rows of every form, by transformers: `<tokenizer>.json` beside this file. With --check,
compares instead of writing.

The *.jsonl files and array.json hold rows as people have them, and refused.jsonl such as cannot be used; rows.json says, by hand, which
question and turns they hold. From that, transformers' `apply_chat_template` and the tokenizer's own library make what
`mempo-sft build` has to make:

- a prompt is what the template writes for the messages that a step sees; every question, completion and reply stands in it
  as its own ids;
- text from outside has no added tokens, and its protocol tags are in other brackets; of what the policy writes, control
  tokens are ordinary text and tags are encoded by themselves;
- targets are the completion and the token that the template closes the turn with.

Made with transformers 5.23, pyarrow 25. Needs the tokenizers of Qwen2.5 and SmolLM2 (`./just tokenizers` fetches them).
"""

import hashlib
import json
import pathlib
import re
import sys

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[3]
TOKENIZERS = {"qwen2.5": ROOT / ".tools/tokenizers/qwen2.5", "smollm2": ROOT / "runs/smollm2/model"}
SYSTEM = (HERE / "profile/system.txt").read_text().strip()
ROWS = json.loads((HERE / "rows.json").read_text())
TAG = re.compile(r"(</?(?:mem|think|tool_call|answer|information)>)")
OUTSIDE_TAG = re.compile(r"<(/?(?:mem|think|tool_call|tool_response|answer|information|search|memory))>")
# Private-use characters mark the places of contents in what a template writes.
MARK = re.compile("[\ue000-\ue0ff]")


class Reference:
    def __init__(self, folder):
        self.chat = PreTrainedTokenizerFast.from_pretrained(folder)
        text = (folder / "tokenizer.json").read_text()
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.trusted = Tokenizer.from_str(text)
        self.plain = Tokenizer.from_str(text)
        self.plain.encode_special_tokens = True
        self.outside = Tokenizer.from_str(json.dumps(json.loads(text) | {"added_tokens": []}))
        for tokenizer in (self.trusted, self.plain, self.outside):
            tokenizer.no_truncation()

    def ids(self, tokenizer, text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def said(self, text):
        return [id for piece in TAG.split(text) if piece for id in self.ids(self.plain, piece)]

    def heard(self, text):
        return self.ids(self.outside, OUTSIDE_TAG.sub(r"‹\1›", text))

    def reply(self, text):
        return self.ids(self.trusted, "<information>") + self.heard(text) + self.ids(self.trusted, "</information>")

    def prompt(self, contents, system):
        """Contents are pairs of a role and ids."""
        marks = [chr(0xE000 + index) for index in range(len(contents))]
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": role, "content": mark} for (role, _), mark in zip(contents, marks)]
        text = self.chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert MARK.findall(text) == marks, text
        pieces = [self.ids(self.trusted, piece) for piece in MARK.split(text)]
        return pieces[0] + [id for (_, content), piece in zip(contents, pieces[1:]) for id in content + piece]

    def end_of_turn(self):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ue000"}]
        text = self.chat.apply_chat_template(messages, tokenize=False)
        return self.ids(self.trusted, text.split("\ue000")[1])[0]

    def example(self, prompt, completion):
        return {"ids": prompt + completion + [self.end_of_turn()], "first_target": len(prompt)}

    def pair(self, question, answer):
        found = self.example(self.prompt([("user", self.heard(question))], None), self.said(answer))
        if "<" not in question + answer and answer == answer.strip():
            # Nothing is special here: the library alone has to come to the same. (White space at the beginning it may join
            # with the line break of the turn's opening, where a policy can't.)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            whole = self.chat.apply_chat_template(messages, tokenize=True, return_dict=False)
            opening = self.chat.apply_chat_template(
                messages[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
            assert whole[:len(found["ids"])] == found["ids"] and len(opening) == found["first_target"], (whole, found)
        return found

    def steps(self, row, context):
        examples = []
        for index, (completion, _, learnt) in enumerate(row["turns"]):
            if not learnt:
                continue
            first = 0 if context == "react" else max(index - 1, 0)
            contents = [("user", self.heard(row["question"]))]
            for earlier, observation, _ in row["turns"][first:index]:
                contents += [("assistant", self.said(earlier)), ("user", self.reply(observation))]
            examples.append(self.example(self.prompt(contents, SYSTEM), self.said(completion)))
        return examples

    def examples(self, row, context):
        if "pair" in row:
            return [self.pair(*row["pair"])]
        if "text" in row:
            return [{"ids": self.ids(self.plain, row["text"]), "first_target": 1}]
        return self.steps(row, context)


def verl_table():
    """verl's rows as its tables have them: one type a column, nested, with nulls."""
    rows = [json.loads(line) for line in (HERE / "verl.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pyarrow.Table.from_pydict({name: [row.get(name) for row in rows] for name in names})


def table():
    """The chat rows as a table, where every key that any message has is there, mostly null."""
    rows = [json.loads(line) for line in (HERE / "chat.jsonl").read_text("utf-8-sig").splitlines() if line.strip()]
    for row in rows:
        for message in row["messages"]:
            if isinstance(message["content"], list):
                message["content"] = "".join(part["text"] for part in message["content"])
            for call in message.get("tool_calls") or []:
                if not isinstance(call["function"]["arguments"], str):
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return pyarrow.Table.from_pylist(rows)


def main():
    check, stale = "--check" in sys.argv, []
    if not check:
        pyarrow.parquet.write_table(table(), HERE / "chat.parquet")
        pyarrow.parquet.write_table(verl_table(), HERE / "verl.parquet")
    for name, folder in TOKENIZERS.items():
        if not (folder / "tokenizer.json").exists():
            print(f"SKIPPED {name}: `./just tokenizers` fetches it")
            continue
        reference = Reference(folder)
        files = {
            file: [example for row in what["rows"] for example in reference.examples(row, what["context"])]
            for file, what in ROWS.items()
        }
        text = json.dumps({"tokenizer_sha256": reference.sha256, "files": files}) + "\n"
        path = HERE / f"{name}.json"
        if not check:
            path.write_text(text)
        elif path.read_text() != text:
            stale.append(path.name)
    if stale:
        sys.exit(f"not what transformers gives now: {', '.join(stale)}")


main()
