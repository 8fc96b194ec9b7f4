"""The drawings of the strategies in docs/context_parallel.md: what each rank has, and what travels."""

from __future__ import annotations

from svg import GREY, LINE, Picture

RANKS = ("#2f6fde", "#e0803a", "#2f9e77", "#9a5bc4")
"""The colour of each rank's tokens."""


def _rank(picture: Picture, x: float, y: float, rank: int) -> None:
    picture.text(x, y, f"rank {rank}", 13, RANKS[rank], "end", "600")


def ulysses() -> str:
    picture = Picture(760, 230, "Ulysses: ranks exchange tokens for heads")
    cell = 26

    def grid(x: float, by_tokens: bool, caption: str) -> None:
        for token in range(4):
            for head in range(4):
                colour = RANKS[token if by_tokens else head]
                picture.box(x + head * cell, 62 + token * cell, cell - 3, cell - 3, colour)
        picture.text(x + 2 * cell, 52, "heads →", 12, GREY, "middle")
        picture.text(x - 8, 62 + 2 * cell, "tokens", 12, GREY, "end")
        picture.text(x + 2 * cell, 190, caption, 13, anchor="middle")

    picture.text(20, 30, "Ulysses", 15, weight="600")
    grid(110, True, "its tokens, all heads")
    grid(330, False, "all tokens, its heads")
    grid(550, True, "its tokens, all heads")
    for x in (224, 444):
        picture.line([(x, 112), (x + 54, 112)], arrow=True)
        picture.text(x + 27, 104, "all to all", 11, GREY, "middle")
    picture.text(382, 210, "attention, by any kernel", 12, GREY, "middle")
    for rank, x in enumerate((500, 565, 630, 695)):
        picture.text(x, 30, f"rank {rank}", 13, RANKS[rank], weight="600")
    return str(picture)


def gather() -> str:
    picture = Picture(760, 230, "Gather: every rank fetches all keys and values during attention to its own")
    picture.text(20, 30, "Gather of keys and values", 15, weight="600")
    picture.text(150, 58, "queries", 12, GREY, "middle")
    picture.text(420, 58, "keys and values", 12, GREY, "middle")
    for rank in range(4):
        y = 70 + rank * 34
        _rank(picture, 90, y + 18, rank)
        picture.box(110, y, 80, 26, RANKS[rank])
        picture.text(205, y + 18, "\u00d7", 15, GREY, "middle")
        for other in range(4):
            x = 220 + 100 * other
            picture.box(x, y, 94, 26, RANKS[other])
            own = other == rank
            picture.text(
                x + 47,
                y + 17,
                "own, at once" if own else "arrives",
                11,
                "#ffffff",
                "middle",
                "600" if own else "normal",
            )
    picture.text(630, 120, "transfer hidden", 12, GREY)
    picture.text(630, 136, "under attention", 12, GREY)
    return str(picture)


def ring() -> str:
    picture = Picture(760, 230, "Ring: keys and values travel from rank to rank")
    picture.text(20, 30, "Ring", 15, weight="600")
    for step in range(4):
        x = 220 + 100 * step
        picture.text(x + 47, 58, f"step {step + 1}", 12, GREY, "middle")
    picture.text(150, 58, "queries", 12, GREY, "middle")
    for rank in range(4):
        y = 70 + rank * 34
        _rank(picture, 90, y + 18, rank)
        picture.box(110, y, 80, 26, RANKS[rank])
        picture.text(205, y + 18, "\u00d7", 15, GREY, "middle")
        for step in range(4):
            of = (rank - step) % 4
            picture.box(220 + 100 * step, y, 94, 26, RANKS[of])
            picture.text(267 + 100 * step, y + 17, f"keys of {of}", 11, "#ffffff", "middle")
    picture.text(630, 112, "one shard at a time;", 12, GREY)
    picture.text(630, 128, "results merge by", 12, GREY)
    picture.text(630, 144, "their log-sum-exp", 12, GREY)
    return str(picture)


def guidance() -> str:
    picture = Picture(760, 230, "Guidance: two groups of ranks compute one branch each")
    picture.text(20, 30, "Guidance on two groups, each with half of the ranks", 15, weight="600")
    for group, (name, y) in enumerate((("with the prompt", 54), ("with the negative prompt", 138))):
        picture.box(40, y, 470, 70, "#f5f6f9", 6, LINE)
        picture.text(56, y + 20, f"group {group}: {name}", 13, GREY)
        for member in range(2):
            rank = 2 * group + member
            x = 56 + 224 * member
            picture.box(x, y + 30, 214, 28, RANKS[rank])
            picture.text(x + 107, y + 49, f"rank {rank}: half of the tokens", 12, "#ffffff", "middle")
        picture.line([(512, y + 35), (560, 118 if group == 0 else 142)], arrow=True)
    picture.box(564, 104, 172, 52, "#f5f6f9", 6, LINE)
    picture.text(650, 126, "one exchange per step:", 12, GREY, "middle")
    picture.text(650, 144, "the branches' outputs", 12, GREY, "middle")
    return str(picture)


def hybrid() -> str:
    picture = Picture(760, 230, "Two machines: Ulysses within each, a ring between them")
    picture.text(20, 30, "Two machines: Ulysses within each, a ring between them", 15, weight="600")
    for machine, x in enumerate((40, 440)):
        picture.box(x, 54, 280, 150, "#f5f6f9", 6, LINE)
        picture.text(x + 16, 76, f"machine {machine}: half of the tokens", 13, GREY)
        for member in range(2):
            rank = 2 * machine + member
            picture.box(x + 16 + 140 * member, 112, 108, 40, RANKS[rank])
            picture.text(x + 70 + 140 * member, 137, f"rank {rank}", 13, "#ffffff", "middle", "600")
        picture.line([(x + 128, 132), (x + 154, 132)], arrow=True)
        picture.line([(x + 154, 140), (x + 128, 140)], arrow=True)
        picture.text(x + 140, 182, "heads, over NVLink", 12, GREY, "middle")
    picture.line([(324, 120), (436, 120)], arrow=True)
    picture.line([(436, 144), (324, 144)], arrow=True)
    picture.text(380, 106, "keys and values,", 12, GREY, "middle")
    picture.text(380, 168, "over the network", 12, GREY, "middle")
    return str(picture)


DRAWINGS = {"ulysses": ulysses, "gather": gather, "ring": ring, "guidance": guidance, "hybrid": hybrid}
