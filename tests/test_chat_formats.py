"""Chat templates of fine-tuned families against the texts that their authors publish."""

from typing import Any

import pytest

from jaxllm import presets

jinja2 = pytest.importorskip("jinja2")
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = list[dict[str, Any]]


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
ENVIRONMENT.globals["raise_exception"] = refuse


def render(name: str, messages: Messages, prompt: bool = True, bos: str = "<s>", eos: str = "</s>") -> str:
    template = ENVIRONMENT.from_string((presets.CHAT / f"{name}.jinja").read_text(encoding="utf-8"))
    return template.render(messages=messages, add_generation_prompt=prompt, bos_token=bos, eos_token=eos)


def talk(*said: str, system: str | None = None) -> Messages:
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


ASSISTANT = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
BAIZE = (
    "The following is a conversation between a human and an AI assistant named Baize (named after a mythical creature in"
    " Chinese folklore). Baize is an open-source AI assistant developed by UCSD and Sun Yat-Sen University. The human and"
    " the AI assistant take turns chatting. Human statements start with [|Human|] and AI assistant statements start with"
    " [|AI|]. The AI assistant always provides responses in as much detail as possible, and in Markdown format. The AI"
    " assistant always declines to engage with topics, questions and instructions related to unethical, controversial, or"
    " sensitive issues. Complete the transcript in exactly that format.\n[|Human|]Hello!\n[|AI|]Hi!"
)
ALPACA2 = "You are a helpful assistant. 你是一个乐于助人的助手。"
LEMON = (
    "Well, I'm quite partial to a good squeeze of fresh lemon juice. It adds just the right amount of zesty flavour to"
    " whatever I'm cooking up in the kitchen!"
)
OLMO = "I'm just a computer program, so I don't have feelings, but I'm functioning as expected. How can I assist you today?"

# template, conversation, the text
PUBLISHED = {
    # tatsu-lab/stanford_alpaca, README.md and train.py: the source, and the source with its target
    "alpaca": ("alpaca", talk("Name a colour."), f"<s>{ALPACA}### Instruction:\nName a colour.\n\n### Response:"),
    "alpaca, answered": (
        "alpaca", talk("Name a colour.", "Red"),
        f"<s>{ALPACA}### Instruction:\nName a colour.\n\n### Response:Red</s>",
    ),
    "alpaca, with an input": (
        "alpaca", [{"role": "user", "content": "Translate to French.", "input": "bread"}],
        ("<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a"
        " response that appropriately completes the request.\n\n### Instruction:\nTranslate to French.\n\n"
        "### Input:\nbread\n\n### Response:"),
    ),
    # ymcui/Chinese-LLaMA-Alpaca, scripts/inference/inference_hf.py
    "chinese_alpaca": (
        "chinese_alpaca", talk("为什么要减少污染，保护环境？"),
        f"<s>{ALPACA}### Instruction:\n\n为什么要减少污染，保护环境？\n\n### Response:\n\n",
    ),
    # ymcui/Chinese-LLaMA-Alpaca-2, scripts/inference/gradio_demo.py
    "chinese_alpaca2": (
        "chinese_alpaca2", talk("你好", "您好！", "再见"),
        f"<s>[INST] <<SYS>>\n{ALPACA2}\n<</SYS>>\n\n你好 [/INST] 您好！</s><s>[INST] 再见 [/INST]",
    ),
    # lm-sys/FastChat, fastchat/conversation.py, vicuna_v1.1, whose turns are one line
    "vicuna": (
        "vicuna", talk("Hello!", "Hello!", "How are you?", "I am good."),
        f"<s>{ASSISTANT.format('user')} USER: Hello! ASSISTANT: Hello!</s>USER: How are you? ASSISTANT: I am good.</s>",
    ),
    # young-geng/EasyLM, docs/koala.md
    "koala": ("koala", talk("Hello!"), "<s>BEGINNING OF CONVERSATION: USER: Hello! GPT:"),
    "koala, second round": (
        "koala", talk("Hello!", "Hi! How can I help you?", "What is the largest animal on earth?"),
        ("<s>BEGINNING OF CONVERSATION: USER: Hello! GPT:Hi! How can I help you?</s>"
        "USER: What is the largest animal on earth? GPT:"),
    ),
    # artidoro/qlora, eval/generations
    "guanaco": (
        "guanaco", talk("What is absolute zero?", "-273.15 C.", "Why?"),
        (f"<s>{ASSISTANT.format('human')} ### Human: What is absolute zero? ### Assistant: -273.15 C. ### Human: Why?"
        " ### Assistant:"),
    ),
    # project-baize/baize-chatbot, demo/app_modules/utils.py
    "baize": ("baize", talk("Why?", "Because.", "Oh"), f"<s>{BAIZE}\n[|Human|]Why?\n[|AI|]Because.\n[|Human|]Oh\n[|AI|]"),
    # meta-llama/llama, llama/generation.py, chat_completion
    "llama2": (
        "llama2", talk(" Hi ", " Hello. ", "Bye", system="Be brief."),
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Hello. </s><s>[INST] Bye [/INST]",
    ),
    "llama2, no system message": ("llama2", talk(" Hi "), "<s>[INST] Hi [/INST]"),
    # LLaMA 3's model card and prompt formats
    "llama3": (
        "llama3",
        talk("What can you help me with?", system="You are a helpful AI assistant for travel tips and recommendations"),
        ("<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful AI assistant for travel tips and"
        " recommendations<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat can you help me with?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ),
    # mistralai/Mistral-7B-Instruct-v0.1, model card
    "mistral": (
        "mistral", talk("What is your favourite condiment?", LEMON, "Do you have mayonnaise recipes?"),
        (f"<s>[INST] What is your favourite condiment? [/INST]{LEMON}</s> "
        "[INST] Do you have mayonnaise recipes? [/INST]"),
    ),
    # HuggingFaceH4/zephyr-7b-beta, model card
    "zephyr": (
        "zephyr",
        talk(
            "How many helicopters can a human eat in one sitting?",
            system="You are a friendly chatbot who always responds in the style of a pirate.",
        ),
        ("<|system|>\nYou are a friendly chatbot who always responds in the style of a pirate.</s>\n<|user|>\n"
        "How many helicopters can a human eat in one sitting?</s>\n<|assistant|>\n"),
    ),
    # openai/openai-python, chatml.md
    "chatml": (
        "chatml", talk("How are you", "I am doing well!", "How are you now?", system="Answer as concisely as possible."),
        ("<|im_start|>system\nAnswer as concisely as possible.<|im_end|>\n<|im_start|>user\nHow are you<|im_end|>\n"
        "<|im_start|>assistant\nI am doing well!<|im_end|>\n<|im_start|>user\nHow are you now?<|im_end|>\n"
        "<|im_start|>assistant\n"),
    ),
    # google/gemma-2b-it, model card
    "gemma": (
        "gemma", talk("Write a hello world program"),
        "<s><start_of_turn>user\nWrite a hello world program<end_of_turn>\n<start_of_turn>model\n",
    ),
    # microsoft/Phi-3-mini-4k-instruct, model card
    "phi3": (
        "phi3", talk("How to explain Internet for a medieval knight?", system="You are a helpful assistant."),
        ("<|system|>\nYou are a helpful assistant.<|end|>\n<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n"
        "<|assistant|>\n"),
    ),
    # allenai/OLMo-2-1124-7B-Instruct, model card
    "tulu": (
        "tulu", talk("How are you doing?", OLMO),
        f"<s><|user|>\nHow are you doing?\n<|assistant|>\n{OLMO}</s>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED)
def test_a_conversation_is_written_as_its_authors_write_it(case):
    name, messages, text = PUBLISHED[case]
    assert render(name, messages, prompt=messages[-1]["role"] == "user") == text


def test_every_template_is_held_against_a_text_and_every_format_has_its_template():
    named = {name for row in presets.published().values() for name in row.chat.split() if name != "-"}
    assert {name for name, _, _ in PUBLISHED.values()} == set(presets.formats()) == named


@pytest.mark.parametrize("name", presets.formats())
def test_a_prompt_is_the_beginning_of_the_answered_conversation(name):
    """So that what was cached of the prompt stays, and a model is asked where it was taught to answer."""
    for before in (talk("One?"), talk("One?", "1.", "Two?"), talk("One?", system="Count.")):
        answered = render(name, [*before, {"role": "assistant", "content": "Yes."}], prompt=False)
        assert answered.startswith(render(name, before)) and "Yes." in answered


@pytest.mark.parametrize("name", presets.formats())
def test_a_system_message_is_said_once_and_a_tool_is_refused_or_named(name):
    assert render(name, talk("One?", "1.", "Two?", system="Count.")).count("Count.") == 1
    tool = [*talk("One?"), {"role": "tool", "content": "x"}]
    try:
        assert "tool" in render(name, tool)
    except jinja2.TemplateError as e:
        assert "got tool" in str(e)
