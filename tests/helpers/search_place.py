"""A tiny random sentence encoder, an adapter of it, and a small BEIR folder: for tests of search and its commands."""

import json
from pathlib import Path

import torch

TOPICS = {
    "ships": "ship harbour sail anchor captain tide",
    "bread": "bread flour oven yeast crust baker",
    "stars": "star planet orbit comet telescope moon",
}
WORDS = sorted({word for text in TOPICS.values() for word in text.split()} | set(TOPICS) | {"the", "of", "number"})


def make_encoder(folder):
    """BERT of width 32 over WORDS, mean pooling, unit length; saved as sentence-transformers does."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    base = Path(folder).with_name(f"{Path(folder).name}-transformer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special).save_pretrained(base)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(base)
    module = Transformer(str(base), max_seq_length=64)
    SentenceTransformer(modules=[module, Pooling(32), Normalize()], device="cpu").save(str(folder))
    return Path(folder)


def make_adapter(base, folder, rank=2, seed=1):
    """A LoRA that changes the vectors, as a PEFT folder."""
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(seed)
    encoder = SentenceTransformer(str(base), device="cpu")
    encoder.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    encoder[0].auto_model.save_pretrained(str(folder))
    return Path(folder)


def make_data(folder):
    """Four documents a topic, a query and its judgements for each, and one judgement of a document not there."""
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True)
    documents, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for topic, text in TOPICS.items():
        words = text.split()
        queries.append({"_id": f"q-{topic}", "text": f"{topic} {words[0]} {words[1]}"})
        for i in range(4):
            body = " ".join(words[i:] + words[:i])
            documents.append({"_id": f"{topic}-{i}", "title": f"the {topic} number", "text": f"{body} " * (i + 1)})
            qrels.append(f"q-{topic}\t{topic}-{i}\t{2 if i == 0 else 1}")
    qrels.append("q-ships\tsunk\t1")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n")
    return folder
