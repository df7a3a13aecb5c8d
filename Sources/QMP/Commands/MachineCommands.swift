import Accelerator
import GuestMemory
import Machine

/// What the machine is, what it is doing, and the commands that change it.
struct MachineCommands: Sendable {
    private let machine: VirtualMachine
    private let name: String

    init(_ machine: VirtualMachine, name: String) {
        self.machine = machine
        self.name = name
    }

    var all: [Command] {
        [
            Command("query-status") { [machine] _ in
                let state = machine.runState
                return ["status": .string(state.rawValue), "running": .bool(state.isRunning), "singlestep": false]
            },
            Command("query-name") { [name] _ in ["name": .string(name)] },
            Command("query-uuid") { [machine] _ in
                ["UUID": .string((machine.configuration.uuid ?? .none).description)]
            },
            Command("query-kvm") { [machine] _ in
                var answer: [String: JSON] = ["enabled": .bool(machine.accelerator?.name == "kvm"), "present": true]
                if let tracking = machine.accelerator?.dirtyTracking {
                    answer["x-dirty-tracking"] = .string(tracking.method)
                    answer["x-manual-protect"] = .bool(tracking.protectsManually)
                    if let entries = tracking.ringEntries { answer["x-dirty-ring-size"] = JSON(entries) }
                }
                return .object(answer)
            },
            Command("query-cpus-fast") { [machine] _ in Self.cpus(machine) },
            Command("query-machines") { _ in .array(MachineConfiguration.Kind.allCases.map(Self.describe)) },
            Command("query-memory-size-summary") { [machine] _ in
                ["base-memory": JSON(machine.memory.byteCount), "plugged-memory": 0]
            },
            Command("stop") { [machine] _ in
                try Self.stop(machine)
                return [:]
            },
            Command("cont") { [machine] _ in
                try machine.resume()
                return [:]
            },
            Command("system_reset") { [machine] _ in
                try machine.reset()
                return [:]
            },
            Command("system_powerdown") { _ in
                throw QMPError(
                    "system_powerdown: this machine has no power button that the guest could see; use 'quit' to end it")
            },
        ]
    }

    /// A stop that could not be kept is refused: these states end by themselves, and the guest may run then.
    private static func stop(_ machine: VirtualMachine) throws {
        switch machine.runState {
        case .inMigrate:
            throw QMPError(
                "stop: the machine waits for an incoming migration, and starts if the guest runs when it arrives; "
                    + "stop it at the source"
            )
        case .finishMigrate:
            throw QMPError("stop: a migration is about to finish and holds the guest; cancel it first (migrate_cancel)")
        default: machine.pause()
        }
    }

    private static func cpus(_ machine: VirtualMachine) -> JSON {
        .array(
            machine.cpuThreadIDs.enumerated().map { index, thread in
                [
                    "cpu-index": JSON(index), "thread-id": JSON(thread), "qom-path": .string("/machine/vcpu[\(index)]"),
                    "target": "x86_64", "props": [:],
                ]
            })
    }

    private static func describe(_ kind: MachineConfiguration.Kind) -> JSON {
        let example = MachineConfiguration(kind: kind, memoryByteCount: GuestPage.byteCount)
        var members: [String: JSON] = [
            "name": .string(example.streamName), "cpu-max": JSON(kind == .pc ? MachineConfiguration.maximumCPUs : 1),
            "hotpluggable-cpus": false, "numa-mem-supported": false, "deprecated": false, "default-ram-id": "ram",
        ]
        if kind == .pc {
            members["alias"] = .string(kind.rawValue)
            members["is-default"] = true
        }
        return .object(members)
    }
}
