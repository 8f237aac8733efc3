r"""A simulated fleet, its record of the truth, and the comparison of that record with what was stored.

Independent of what it tests: nothing here imports `gateway` or `cloud_sync`, and the MQTT stack is another
one (aiomqtt on paho), so that an error of ours is not mirrored here.

    scenarios -> devices -> fleet  \
                                    >  broker (MQTT)  and  ground truth (produced, acknowledged)
    recordings -> replay           /
    ground truth + stored rows (databases, files, spools) -> verify
"""
