import Glibc
import Host
import QMP
import Testing

/// Where a test runs the built `godwit`: a folder of its own, which is also the runtime folder of the VMs it starts.
///
/// Every process it starts has a deadline and dies with the test run; what is left is ended and removed at the end.
final class Workbench {
    /// What a finished process left.
    struct Outcome: CustomStringConvertible {
        let status: ChildProcess.ExitStatus?
        let output: String
        let errors: String

        var description: String { "\(status.map { "\($0)" } ?? "still running")\n\(output)\n\(errors)" }
        /// The error output as lines, without the hint where to read on.
        var errorLines: [Substring] { errors.split(separator: "\n").filter { !$0.hasPrefix("See '") } }
        var lastErrorLine: String { errorLines.last.map(String.init) ?? "" }
    }

    let folder: String
    private var children: [ChildProcess] = []
    private var counter = 0

    static var hasKVM: Bool { unsafe access("/dev/kvm", R_OK | W_OK) == 0 }

    init() throws {
        var template = Array("/tmp/godwit-test-XXXXXX".utf8CString)
        // SAFETY: mkdtemp changes the six X of the terminated text in place.
        try #require(unsafe mkdtemp(&template) != nil)
        folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    deinit {
        for child in children where child.poll() == nil { child.end(graceMilliseconds: 3000) }
        Self.remove(folder)
    }

    /// Removes a folder of ours and all in it.
    private static func remove(_ folder: String) {
        for name in (try? FileSystem.names(inFolder: folder)) ?? [] {
            let path = "\(folder)/\(name)"
            if (try? FileSystem.status(of: path))?.kind == .folder { remove(path) } else { Descriptor.remove(path) }
        }
        unsafe rmdir(folder)
    }

    /// The folder of the sockets.
    var runtime: String { "\(folder)/godwit" }

    /// The binary beside the test bundle.
    static let binary: String = {
        var buffer = [UInt8](repeating: 0, count: 4096)
        // SAFETY: readlink fills at most the buffer's count and tells how much.
        let count = unsafe buffer.withUnsafeMutableBytes {
            unsafe readlink("/proc/self/exe", $0.baseAddress!.assumingMemoryBound(to: CChar.self), $0.count)
        }
        let path = String(decoding: buffer.prefix(max(0, count)), as: UTF8.self)
        return path.split(separator: "/").dropLast().reduce("") { $0 + "/" + $1 } + "/godwit"
    }()

    /// Runs `godwit` to its end. - Parameter through: a program and its arguments that start it.
    func run(
        _ arguments: [String], input: String = "", through: [String] = [], seconds: UInt64 = 20
    ) throws -> Outcome {
        let child = try start(arguments, input: input, through: through)
        return finish(child, seconds: seconds)
    }

    /// Waits for the end of what `start` started.
    func finish(_ child: (process: ChildProcess, stem: String), seconds: UInt64 = 20) -> Outcome {
        let status = child.process.wait(deadline: .after(seconds: seconds))
        if status == nil { child.process.end(graceMilliseconds: 100) }
        return Outcome(status: status, output: text(child.stem + ".out"), errors: text(child.stem + ".err"))
    }

    func start(
        _ arguments: [String], input: String = "", through: [String] = []
    ) throws -> (process: ChildProcess, stem: String) {
        counter += 1
        let stem = "\(folder)/\(counter)"
        try Descriptor.create(stem + ".in").writeAll(Array(input.utf8))
        let process = try ChildProcess(
            ["env", "XDG_RUNTIME_DIR=\(folder)", "TMPDIR=\(folder)"] + through + [Self.binary] + arguments,
            input: Descriptor.open(stem + ".in", O_RDONLY), output: Descriptor.create(stem + ".out"),
            error: Descriptor.create(stem + ".err"))
        children.append(process)
        return (process, stem)
    }

    /// Starts a VM and waits until it takes commands.
    func startVM(_ name: String, _ options: [String]) throws -> VM {
        let child = try start(["run", "--name", name, "--die-with-parent", "--serial", "none"] + options)
        let path = "\(runtime)/\(name).qmp"
        let deadline = Deadline.after(seconds: 20)
        while true {
            if let client = try? QMPClient(path: path) {
                return VM(name: name, process: child.process, stem: child.stem, client: client)
            }
            try #require(child.process.poll() == nil && !deadline.hasPassed, "\(finish(child, seconds: 0))")
            Clock.sleep(nanoseconds: 5_000_000)
        }
    }

    private func text(_ path: String) -> String {
        String(decoding: (try? Descriptor.contents(of: path)) ?? [], as: UTF8.self)
    }

    /// A VM that a test started.
    struct VM {
        let name: String
        let process: ChildProcess
        let stem: String
        let client: QMPClient

        var log: String { String(decoding: (try? Descriptor.contents(of: stem + ".err")) ?? [], as: UTF8.self) }

        func status() throws -> String? { try client.execute("query-status")["status"]?.stringValue }

        /// Where it waits for a migration.
        func port() throws -> String {
            try #require(try client.execute("query-migrate")["socket-address"]?[0]?["port"]?.stringValue)
        }

        /// Waits until the log has the words.
        func waitForLog(_ words: String, seconds: UInt64 = 30) -> Bool {
            let deadline = Deadline.after(seconds: seconds)
            while !log.contains(words) {
                if deadline.hasPassed { return false }
                Clock.sleep(nanoseconds: 5_000_000)
            }
            return true
        }

        func waitForGuest() throws {
            let deadline = Deadline.after(seconds: 30)
            while (try? client.execute("x-query-guest"))?["ready"] != true {
                try #require(!deadline.hasPassed, "the guest did not fill its memory")
                Clock.sleep(nanoseconds: 10_000_000)
            }
        }
    }
}
