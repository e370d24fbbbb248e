"""A real Redis Cluster: masters of the same server that the other fixtures run, and what befalls them."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from overdrive.demo import servers

_SLOTS = 16_384


class RedisCluster:
    """Three masters, each with a third of the slots, and the clock's of the prefix `test` on the first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ports = [_free_port() for _ in range(3)]
        self._running = [ExitStack() for _ in self.ports]
        self.nodes = [Redis(port=port) for port in self.ports]

    @property
    def url(self) -> str:
        # Not the clock's node: the others are learnt from any.
        return f"redis+cluster://127.0.0.1:{self.ports[2]}"

    def keeper(self, name: str) -> int:
        """The number of the node that has been given the slot of a key."""
        clock = key_slot(b"{test}")
        return ((key_slot(name.encode()) - clock) % _SLOTS) * 3 // _SLOTS

    def key_at(self, node: int, after: str = "") -> str:
        """A key whose entry belongs to a node."""
        return next(key for key in (f"{after}{n}" for n in range(1000)) if self.keeper(f"test:entry:{key}") == node)

    def start(self, node: int) -> None:
        directory = self._directory / str(node)
        directory.mkdir(exist_ok=True)
        port = self.ports[node]
        command = [servers.redis_binary(), "--bind", "127.0.0.1", "--port", str(port)]
        command += ["--dir", directory, "--save", "", "--appendonly", "no", "--cluster-enabled", "yes"]
        command += ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "3000"]
        self._running[node].enter_context(
            servers._running(command, directory, lambda: servers._pongs(port), signal.SIGKILL)
        )

    def stop(self, node: int) -> None:
        self.nodes[node].connection_pool.disconnect()
        self._running[node].close()

    def form(self) -> None:
        """Share out the slots, and make the nodes known to each other."""
        for number, node in enumerate(self.nodes):
            clock = key_slot(b"{test}")
            slots = [slot for slot in range(_SLOTS) if ((slot - clock) % _SLOTS) * 3 // _SLOTS == number]
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            node.execute_command("CLUSTER ADDSLOTS", *slots)
            node.execute_command("CLUSTER MEET", "127.0.0.1", self.ports[0])
        self.wait(lambda: all(self._is_whole(node) for node in self.nodes))

    def _is_whole(self, node: Redis) -> bool:
        served = {port for _, _, (_, port, *_), *_ in node.execute_command("CLUSTER SLOTS")}
        return node.execute_command("CLUSTER INFO")["cluster_state"] == "ok" and served == set(self.ports[:3])

    def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            with suppress(RedisError):
                if condition():
                    return
            time.sleep(0.02)
        raise AssertionError("the cluster did not come to that")

    def add_replica(self, node: int) -> int:
        """Start a replica of a node, and return its number."""
        number, identity = len(self.nodes), self.identity(node)
        self.ports.append(_free_port())
        self.nodes.append(Redis(port=self.ports[number]))
        self._running.append(ExitStack())
        self.start(number)
        replica = self.nodes[number]
        replica.execute_command("CLUSTER MEET", "127.0.0.1", self.ports[0])
        self.wait(lambda: bool(replica.execute_command("CLUSTER REPLICATE", identity)))
        self.wait(lambda: self._is_whole(replica) and replica.info("replication")["master_link_status"] == "up")
        self.agree()
        return number

    def take_over(self, replica: int, node: int) -> None:
        """Make a replica the master of its dead master's slots, and wait until the others know."""
        self.nodes[replica].execute_command("CLUSTER FAILOVER", "TAKEOVER")
        port = self.ports[replica]
        others = [each for number, each in enumerate(self.nodes) if number != node]
        self.wait(
            lambda: all(
                any(master[1] == port for _, _, master, *_ in other.execute_command("CLUSTER SLOTS"))
                for other in others
            )
        )

    def identity(self, node: int) -> str:
        return self.nodes[node].execute_command("CLUSTER MYID").decode()

    def agree(self) -> None:
        """Wait until all nodes have heard of the last move: the next one would be decided by chance."""
        self.wait(lambda: len({self._view(node) for node in self.nodes}) == 1)

    def _view(self, node: Redis) -> frozenset[tuple[object, ...]]:
        known = node.execute_command("CLUSTER NODES").values()
        return frozenset((each["node_id"], each["epoch"], str(each["slots"])) for each in known)

    def begin_to_move(self, slot: int, source: int, target: int) -> None:
        self.agree()
        self.nodes[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", self.identity(source))
        self.nodes[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", self.identity(target))

    def move_keys(self, slot: int, source: int, target: int) -> None:
        keys = self.nodes[source].execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
        if keys:
            self.nodes[source].execute_command("MIGRATE", "127.0.0.1", self.ports[target], "", 0, 5000, "KEYS", *keys)

    def hand_over(self, slot: int, source: int, target: int) -> None:
        for node in (target, source):
            self.nodes[node].execute_command("CLUSTER SETSLOT", slot, "NODE", self.identity(target))

    def move(self, slot: int, source: int, target: int) -> None:
        self.begin_to_move(slot, source, target)
        self.move_keys(slot, source, target)
        self.hand_over(slot, source, target)

    def flush(self) -> None:
        self.agree()
        for node in self.nodes:
            node.flushall()

    def close(self) -> None:
        for node in range(len(self.nodes)):
            self.stop(node)


def _free_port() -> int:
    """A port whose bus, 10,000 above, is free too."""
    while True:
        port = servers._free_port()
        with suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 10_000)):
            return port


@contextmanager
def redis_cluster(directory: Path) -> Iterator[RedisCluster]:
    cluster = RedisCluster(directory)
    try:
        for node in range(len(cluster.nodes)):
            cluster.start(node)
        cluster.form()
        yield cluster
    finally:
        cluster.close()
