"""Who measures with whom, and when."""


def plan_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs in which each node meets every other one once: the circle of a tournament."""
    seats = [*range(num_nodes), *([-1] if num_nodes % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[i], seats[-1 - i]) for i in range(len(seats) // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds
