import Glibc
import Host
import QMP

/// The machine that a benchmark ran on, as the reader of its figures wants to know it.
struct MachineDescription: Equatable, Sendable {
    var processor: String
    var cores: Int
    var kernel: String
    var memoryBytes: UInt64
    /// The load average of the last minute, at the start.
    var load: Double

    /// What /proc tells now.
    static var current: MachineDescription {
        let processor = line(of: "/proc/cpuinfo", named: "model name") ?? "unknown"
        let kernel = text("/proc/sys/kernel/osrelease").split(separator: "\n").first.map(String.init) ?? "unknown"
        let load = text("/proc/loadavg").split(separator: " ").first.flatMap { Double($0) } ?? 0
        return MachineDescription(
            processor: processor, cores: sysconf(Int32(_SC_NPROCESSORS_ONLN)), kernel: kernel,
            memoryBytes: HostMemory.byteCount, load: load)
    }

    private static func text(_ path: String) -> String {
        String(decoding: (try? Descriptor.contents(of: path, limit: 1 << 20)) ?? [], as: UTF8.self)
    }

    /// What stands behind the colon of the first line with this name.
    private static func line(of path: String, named name: String) -> String? {
        guard let line = text(path).split(separator: "\n").first(where: { $0.hasPrefix(name) }),
            let colon = line.firstIndex(of: ":")
        else { return nil }
        return String(line[colon...].dropFirst().drop { $0 == " " })
    }
}

extension MachineDescription {
    var json: JSON {
        [
            "cpu": .string(processor), "cores": JSON(cores), "kernel": .string(kernel), "memory": JSON(memoryBytes),
            "load": .double(load),
        ]
    }

    init(_ json: JSON?) {
        processor = json?["cpu"]?.stringValue ?? "unknown"
        cores = json?["cores"]?.integerValue() ?? 0
        kernel = json?["kernel"]?.stringValue ?? "unknown"
        memoryBytes = json?["memory"]?.integerValue(as: UInt64.self) ?? 0
        load = json?["load"]?.doubleValue ?? 0
    }
}
