import Host

/// CPU time of another process, from /proc.
struct ProcessorTime: Sendable {
    /// Of all its threads, also those that have ended. The kernel tells it in hundredths of a second.
    var processMilliseconds: Double
    /// Of the threads that were asked for.
    var threadMilliseconds: Double

    /// - Parameter threads: kernel ids, such as those of the vCPUs.
    init(process: Int32, threads: [Int]) {
        processMilliseconds = Self.ticks("/proc/\(process)/stat") * 10
        threadMilliseconds = threads.reduce(0) { sum, thread in
            let path = "/proc/\(process)/task/\(thread)"
            // Nanoseconds on a processor, where the kernel keeps them.
            let precise = Self.text("\(path)/schedstat").split(separator: " ").first.flatMap { Double($0) }
            return sum + (precise.map { $0 / 1e6 } ?? Self.ticks("\(path)/stat") * 10)
        }
    }

    /// User and system time: fields 14 and 15, of which the second field, in brackets, may hold anything.
    static func ticks(_ path: String) -> Double {
        let line = text(path)
        guard let end = line.lastIndex(of: ")") else { return 0 }
        let fields = line[end...].split(separator: " ").dropFirst()
        return fields.dropFirst(11).prefix(2).reduce(0) { $0 + (Double($1) ?? 0) }
    }

    private static func text(_ path: String) -> String {
        String(decoding: (try? Descriptor.contents(of: path, limit: 4096)) ?? [], as: UTF8.self)
    }
}
