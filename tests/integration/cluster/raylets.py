"""Three raylets with one CPU each on this machine; ends with its standard input. Prints the address."""

import json
import os
import sys

from ray.cluster_utils import Cluster


def main(folder: str) -> None:
    """Starts, says where, waits, ends; a line with a number kills that raylet and reaps it."""
    # Ray notes the cluster's address there without making the folder.
    os.makedirs("/tmp/ray", exist_ok=True)
    head = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    others = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
    cluster.wait_for_nodes()
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        process = others[int(line)].all_processes["raylet"][0].process
        process.kill()
        process.wait()
        print(json.dumps({"killed": int(line)}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
