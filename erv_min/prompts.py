"""What the models are asked: the question, its ChatML form in each stage, and the prompts of figures 3, 6 and 7.

The project renders the inference form in every stage (divergence 10); "sft" and "grpo" are the released forms.
`<video>` and `<audio>` mark where Eq. 1 puts the modality tokens (tokenizer.py turns them into -201 and -202).
"""

import re

from erv_min.base.errors import SettingsError

SYSTEM = "You are a helpful assistant."  # the default turn of Qwen2's template; Tokenizer.system reads a folder's own
QUESTION = ("As an emotional recognition expert; throughout the video, which emotion conveyed by the characters is the "
            "most obvious to you?")
REASONING_SUFFIX = "Output the thinking process in <think> </think> and final emotion in <answer> </answer> tags."
VIDEO_TURN, AUDIO_TURN = "<vi_start><video><vi_end>\n", "<au_start><audio><au_end>\n"
QWEN2_VL = "<|vision_start|><|video_pad|><|vision_end|>"  # what Qwen2-VL's template puts before the turn in GRPO
MODALITIES = {"video_audio": VIDEO_TURN + AUDIO_TURN, "video": VIDEO_TURN, "audio": AUDIO_TURN, "text": "\n"}
PLACEHOLDER = re.compile(r"<(?:video|audio|image)>|<\|[^<>|]*\|>")  # also the template's own marks


def user_turn(question: str, modality: str = "video_audio", stage: str = "inference") -> str:
    """The user's turn in the released form of a stage. Released SFT writes both tags whatever the modality."""
    before = {"inference": MODALITIES[modality], "sft": VIDEO_TURN + AUDIO_TURN + "\n\n",
              "grpo": QWEN2_VL + MODALITIES[modality]}
    if found := PLACEHOLDER.search(question):
        raise SettingsError(f"the question holds {found[0]!r}, which the prompt itself places; leave it out")
    return before[stage] + question


def render(question: str = f"{QUESTION} {REASONING_SUFFIX}", modality: str = "video_audio", stage: str = "inference",
           system: str | None = SYSTEM) -> str:
    """The whole prompt P in ChatML, up to where the assistant's turn begins; system None: without a system turn.

    Raises SettingsError on a question that holds a placeholder."""
    begin = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{begin}<|im_start|>user\n{user_turn(question, modality, stage)}<|im_end|>\n<|im_start|>assistant\n"


def gate_text(question: str = f"{QUESTION} {REASONING_SUFFIX}", modality: str = "video_audio",
              stage: str = "inference") -> str:
    """What the text gate's BERT reads: the bare question; in released SFT the wrapped turn without the video tag."""
    if stage != "sft":
        return question
    return user_turn(question, modality, stage).replace("<video>", "").replace("\n", "")


def question_with_subtitle(question: str, subtitle: str) -> str:
    """The question with what is said in the clip; the question alone if nothing is. The wording is ours: the paper's
    explanations quote subtitles, but it gives no prompt for them. A subtitle cannot place a clip or end a turn."""
    subtitle = " ".join(PLACEHOLDER.sub(" ", subtitle).split())
    return f'{question} The subtitle of the video is: "{subtitle}"' if subtitle else question


def sft_target(explanation: str, answer: str) -> str:
    """The assistant's turn that SFT teaches (section 3.1)."""
    return f"<think>{explanation}</think>\n<answer>{answer}</answer>"


def judge_prompt(explanation: str, labels) -> str:
    """Figure 3. labels: a permutation of the data set's (the caller permutes)."""
    return (f"Read the reasoning content and respond with the appropriate emotion in {', '.join(labels)}.\n"
            f"Reply with only the emotion word.\nReason: {explanation} Answer Emotion:")


def label_prompt(explanation: str, labels) -> str:
    """Figure 6: up to two emotions for a description, to train the verifier on. labels: a permutation of MAFW's."""
    return (f"Read the reasoning content and respond with the appropriate emotion in {', '.join(labels)}. Primarily "
            "output a single dominant emotion. If necessary, output up to 2 dominant emotions, separated by commas. "
            f"Reply with only the emotion word.\nReason: {explanation} Answer Emotion:")


def complement_prompt(emotion: str, examples: tuple[str, str]) -> str:
    """Figure 7: a new description for a rare emotion, after two examples of it from the pseudo-labelled set."""
    first, second = examples
    return ("You are an expert in audiovisual analysis with a talent for describing emotions. Goal: Carefully "
            "interpret the video's visual, auditory, and contextual elements, then portray the Target Emotion in vivid "
            f"language.\n\nExample 1 (Target Emotion: {emotion}):\n{first}\n\nExample 2 (Target Emotion: {emotion}):\n"
            f"{second}\n\nNow, based on the examples and the guidelines above, generate a new description that "
            f"effectively conveys the following target emotion:\n\nTarget Emotion: {emotion}")
