import CommandLineKit
import Glibc
public import Host
public import QMP

/// A piece of a benchmark that runs in a process of its own: a fresh address space, its own VM, and nothing left when it ends.
///
/// `ask` starts this program again with the hidden subcommand `bench-worker`, which runs `measure` and prints what it returns.
public protocol BenchmarkWorker: Sendable {
    /// By which it is found in `BenchmarkWorkerList`.
    static var name: String { get }
    /// Measures, on the main thread of the worker's process. - Throws: what kept it from measuring.
    static func measure(_ arguments: JSON) throws -> JSON
}

extension BenchmarkWorker {
    /// Runs the worker in a new process. Call it on the main thread: the process dies with the thread that started it.
    /// - Throws: `CommandFailure` with the worker's own sentence, after the deadline, or when the user asked for the end.
    public static func ask(
        _ arguments: JSON, options: BenchmarkOptions, deadline: Deadline = .after(seconds: 120)
    ) throws -> JSON {
        try BenchmarkWorkers.ask(name, arguments, options: options, deadline: deadline)
    }
}

/// Starts workers, and is what they start as.
public enum BenchmarkWorkers {
    /// In the worker's process: runs the worker of that name. - Returns: what it measured.
    public static func run(_ name: String, arguments text: String) throws -> JSON {
        try ChildProcess.dieWithParent()
        guard let worker = BenchmarkWorkerList.all.first(where: { $0.name == name }) else {
            throw CommandFailure("no worker '\(name)'")
        }
        let arguments: JSON
        do { arguments = try JSON(parsing: text.utf8) } catch {
            throw CommandFailure("arguments of worker '\(name)': \(error)")
        }
        return try worker.measure(arguments)
    }

    static func ask(_ name: String, _ arguments: JSON, options: BenchmarkOptions, deadline: Deadline) throws -> JSON {
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        let process = try ChildProcess(
            [try ThisProgram.path(), "bench-worker", name, "\(arguments)"],
            input: try Descriptor.open("/dev/null", O_RDONLY), output: try Descriptor.create("\(folder.path)/output"),
            error: try Descriptor.create("\(folder.path)/errors"))
        defer { process.end(graceMilliseconds: 200) }
        while process.wait(deadline: .after(milliseconds: 100)) == nil {
            try options.checkInterruption()
            guard !deadline.hasPassed else { throw CommandFailure("worker '\(name)': it did not end in time") }
        }
        guard process.poll()?.isSuccess == true else {
            throw CommandFailure("worker '\(name)': \(lastWords(in: folder, process.poll()))")
        }
        do {
            return try JSON(parsing: try Descriptor.contents(of: "\(folder.path)/output", limit: 64 << 20))
        } catch { throw CommandFailure("worker '\(name)': what it printed is no JSON (\(error))") }
    }

    private static func lastWords(in folder: PrivateFolder, _ status: ChildProcess.ExitStatus?) -> String {
        let bytes = (try? Descriptor.contents(of: "\(folder.path)/errors", limit: 1 << 20)) ?? []
        guard let line = String(decoding: bytes, as: UTF8.self).split(separator: "\n").last else {
            return "it ended without a word (\(status.map { "\($0)" } ?? "unknown"))"
        }
        return String(line.hasPrefix("godwit: ") ? line.dropFirst(8) : line)
    }
}
