import CommandLineKit
import Host

/// CPU time of another process, from /proc.
struct ProcessorTime: Sendable {
    /// Of all its threads, also those that have ended. The kernel tells it in hundredths of a second.
    var processMilliseconds: Double
    /// Of the threads that were asked for.
    var threadMilliseconds: Double

    /// - Parameter threads: kernel ids, such as those of the vCPUs.
    /// - Throws: `CommandFailure` for a process or thread that is not there: it is not one that took no time.
    init(process: Int32, threads: [Int]) throws(CommandFailure) {
        processMilliseconds = try Self.ticks("/proc/\(process)/stat") * 10
        threadMilliseconds = 0
        for thread in threads {
            let path = "/proc/\(process)/task/\(thread)"
            // Nanoseconds on a processor, where the kernel keeps them.
            let precise = Self.text("\(path)/schedstat").split(separator: " ").first.flatMap { Double($0) }
            if let precise {
                threadMilliseconds += precise / 1e6
            } else {
                threadMilliseconds += try Self.ticks("\(path)/stat") * 10
            }
        }
    }

    /// User and system time: fields 14 and 15, of which the second field, in brackets, may hold anything.
    static func ticks(_ path: String) throws(CommandFailure) -> Double {
        let line = text(path)
        let fields = line.lastIndex(of: ")").map { line[$0...].split(separator: " ").dropFirst().dropFirst(11) } ?? []
        let times = fields.prefix(2).compactMap { Double($0) }
        guard times.count == 2 else { throw CommandFailure("read \(path): it tells no processor time") }
        return times[0] + times[1]
    }

    private static func text(_ path: String) -> String {
        String(decoding: (try? Descriptor.contents(of: path, limit: 4096)) ?? [], as: UTF8.self)
    }
}
