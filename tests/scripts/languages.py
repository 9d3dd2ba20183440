"""Russian and Chinese with GPT-2's vocabulary and with one of their own, after the same minutes of training.

    python tests/scripts/languages.py --minutes 2

The texts are made here, from word lists and a few patterns of sentences: originals, which leave a model something to
learn (agreement, word order, who did what) and are no measure of the languages. Prints a Markdown table: characters a
token, tokens and updates that the time was enough for, and bits per byte of the held-out tenth.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RUSSIAN = {
    "who": ["Старый рыбак", "Молодой учитель", "Наш сосед", "Часовщик", "Капитан", "Мой брат", "Лесник", "Почтальон"],
    "did": ["видел", "забыл", "искал", "нашёл", "рисовал", "помнил", "продавал", "чинил", "любил", "ждал"],
    "what": ["лодку", "письмо", "старые часы", "дорогу к морю", "синюю дверь", "красный зонт", "песню"],
    "when": ["утром", "поздно вечером", "в конце зимы", "после дождя", "каждую субботу", "на рассвете", "весной"],
    "where": ["у реки", "за мельницей", "на площади", "в саду", "под мостом", "у маяка", "в пустой комнате"],
    "then": ["Потом пошёл снег.", "Никто ему не ответил.", "Все засмеялись.", "Так прошёл год.", "Было очень тихо."],
    "patterns": ["{who} {did} {what} {where}. ", "{when} {who} {did} {what}. ", "{who} сказал: «Я {did} {what}». ",
                 "{then} ", "Почему {who} {did} {what} {when}? "],
}
CHINESE = {
    "who": ["老渔夫", "年轻的老师", "我们的邻居", "修表的人", "船长", "我的哥哥", "守林人", "邮递员"],
    "did": ["看见了", "忘记了", "找到了", "画了", "记得", "卖掉了", "修好了", "喜欢", "等着"],
    "what": ["一条小船", "那封信", "旧钟", "去海边的路", "蓝色的门", "红雨伞", "一首安静的歌", "面包"],
    "when": ["早上", "深夜", "冬天快结束时", "下雨以后", "每个星期六", "天亮的时候", "春天"],
    "where": ["在河边", "在磨坊后面", "在广场上", "在花园里", "在桥下", "在灯塔旁", "在空房间里"],
    "then": ["后来下雪了。", "没有人回答他。", "大家都笑了。", "一年就这样过去了。", "四周非常安静。"],
    "patterns": ["{who}{where}{did}{what}。", "{when}，{who}{did}{what}。", "{who}说：“我{where}{did}{what}。”",
                 "{then}", "为什么{who}{when}{did}{what}？"],
}


def make_text(words, size):
    """A text of at least `size` bytes of UTF-8 in paragraphs of a few sentences; the same every time."""
    draw, paragraphs, written = random.Random(5), [], 0
    while written < size:
        sentences = []
        for _ in range(draw.randint(3, 7)):
            pattern = draw.choice(words["patterns"])
            sentence = pattern.format(**{slot: draw.choice(choices) for slot, choices in words.items()}).strip()
            sentences.append(sentence[0].upper() + sentence[1:])
        paragraphs.append(("" if words is CHINESE else " ").join(sentences))
        written += len(paragraphs[-1].encode())
    return "\n\n".join(paragraphs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--size", type=int, default=1_000_000, help="bytes of each text")
    args = parser.parse_args()
    print("| text | vocabulary | characters a token | updates | tokens | bits per byte |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as work:
        for name, words in (("Russian", RUSSIAN), ("Chinese", CHINESE)):
            paragraphs = make_text(words, args.size).split("\n\n")
            cut = len(paragraphs) * 9 // 10
            text, held_out = Path(work, f"{name}.txt"), Path(work, f"{name}_val.txt")
            text.write_text("\n\n".join(paragraphs[:cut]), encoding="utf-8")
            held_out.write_text("\n\n".join(paragraphs[cut:]), encoding="utf-8")
            for vocabulary in ("gpt2", "2048"):
                log = Path(work, f"log_{name}_{vocabulary}")
                # --val_data: both are validated on the same bytes
                command = [sys.executable, ROOT / "train_gpt2.py", "--preset", "tiny", "--tokenizer", vocabulary,
                           "--data", text, "--val_data", held_out, "--minutes", str(args.minutes), "--log_dir", log]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                density = re.search(r"([\d.]+) characters a token", done.stdout)[1]
                tokens = re.search(r"steps, ([\d,]+) tokens", done.stdout)[1]
                rows = [json.loads(line) for line in Path(log, "metrics.jsonl").read_text().splitlines()]
                last = [row for row in rows if row["kind"] == "val"][-1]
                print(f"| {name} | {vocabulary} | {density} | {last['step']} | {tokens} "
                      f"| {last['bits_per_byte']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
