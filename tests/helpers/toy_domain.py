"""The toy domain shift of GPL: documents in words that the encoder does not know, queries in words that it does.

24 topics, each with twelve old words, whose embeddings point towards the topic's vector, and twelve new words, whose
embeddings are random. A share of the generated queries is off-topic: written for a document of another topic.
"""

import json
import random
from pathlib import Path

import torch

TOPICS, WORDS, DIM = 24, 12, 64


def vocabulary():
    """Old and new words of every topic."""
    old = [[f"old{topic}x{i}" for i in range(WORDS)] for topic in range(TOPICS)]
    new = [[f"new{topic}x{i}" for i in range(WORDS)] for topic in range(TOPICS)]
    return old, new


def make_encoder(folder, seed=0):
    """A one-layer BERT whose word embeddings are as said above; mean pooling, vectors of length 1."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    old, new = vocabulary()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for topic in old + new for word in topic)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    base = Path(folder).with_name(f"{Path(folder).name}-bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special).save_pretrained(base)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * DIM,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config)
    with torch.no_grad():
        table = model.embeddings.word_embeddings.weight
        table.normal_()
        topics = torch.randn(TOPICS, DIM)
        for topic in range(TOPICS):
            for word in old[topic]:
                table[words.index(word)] = topics[topic] + 0.5 * torch.randn(DIM)
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(base)
    module = Transformer(str(base), max_seq_length=32)
    SentenceTransformer(modules=[module, Pooling(DIM), Normalize()], device="cpu").save(str(folder))
    return str(folder)


def make_corpus(folder, off_topic, seed=0, documents=400, per_document=1):
    """A BEIR folder: documents in new words, training queries in old words (qrels/train), test queries (qrels/test)."""
    chance = random.Random(seed)
    old, new = vocabulary()
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True)
    topics = [i % TOPICS for i in range(documents)]
    corpus = [
        {"_id": f"d{i}", "title": "", "text": " ".join(chance.choices(new[t], k=8))} for i, t in enumerate(topics)
    ]
    queries, train, test = [], ["query-id\tcorpus-id\tscore"], ["query-id\tcorpus-id\tscore"]
    for i, topic in enumerate(topics):
        for j in range(per_document):
            about = chance.randrange(TOPICS) if chance.random() < off_topic else topic
            queries.append({"_id": f"g{i}-{j}", "text": " ".join(chance.choices(old[about], k=4))})
            train.append(f"g{i}-{j}\td{i}\t1")
    held_out = []
    for topic in range(TOPICS):
        for j in range(2):
            held_out.append({"_id": f"t{topic}-{j}", "text": " ".join(chance.sample(old[topic], 4))})
            test += [f"t{topic}-{j}\td{i}\t1" for i, other in enumerate(topics) if other == topic]
    lines = {"corpus.jsonl": corpus, "queries.jsonl": queries}
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "train.tsv").write_text("\n".join(train) + "\n")
    return folder, {row["_id"]: row["text"] for row in held_out}, test


def topic_of(text):
    """The topic that most of a text's words belong to."""
    found = [int(word[3:].split("x")[0]) for word in text.split()]
    return max(set(found), key=found.count)


def teacher(pairs):
    """What a good cross-encoder says: 6 for the same topic, -6 for another."""
    return [6.0 if topic_of(query) == topic_of(document) else -6.0 for query, document in pairs]


def ndcg(encoder, folder, held_out):
    """nDCG@10 of the held-out queries: documents of the topic are relevant."""
    import math

    from polyrank.retrieval.corpus import document_text, read_corpus
    from polyrank.retrieval.dense import encode_corpus
    from polyrank.retrieval.neighbours import top_k

    texts = [document_text(one) for one in read_corpus(folder)]
    ids, _ = top_k(encode_corpus(encoder, list(held_out.values())), encode_corpus(encoder, texts), 10)
    ideal = sum(1 / math.log2(rank + 2) for rank in range(10))
    gains = 0.0
    for query, row in zip(held_out.values(), ids, strict=True):
        hits = (topic_of(texts[i]) == topic_of(query) for i in row)
        gains += sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits)) / ideal
    return gains / len(held_out)
