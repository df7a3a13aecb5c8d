//! The Support room: what tests that start real processes share.
//!
//! `Workbench` is the folder such a test works in, and the owner of the processes it starts: `godwit` as it was built, and QEMU
//! (`QEMU.swift`). `VM` is the handle of a running one, `CuttingProxy` the network between two of them.

import Glibc
public import Host
import QMP

/// What keeps a test from going on, as one sentence. A test that meets one fails.
public struct TestObstacle: Error, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

/// Where a test runs the built `godwit`: a folder of its own, which is also the runtime folder of the VMs it starts.
///
/// Every process it starts has a deadline and dies with the test run; what is left is ended and removed at the end.
public final class Workbench {
    /// What a finished process left.
    public struct Outcome: CustomStringConvertible {
        public let status: ChildProcess.ExitStatus?
        public let output: String
        public let errors: String

        public var description: String { "\(status.map { "\($0)" } ?? "still running")\n\(output)\n\(errors)" }
        /// The error output as lines, without the hint where to read on.
        public var errorLines: [Substring] { errors.split(separator: "\n").filter { !$0.hasPrefix("See '") } }
        public var lastErrorLine: String { errorLines.last.map(String.init) ?? "" }
    }

    public let folder: String
    private var children: [ChildProcess] = []
    private var counter = 0

    public static var hasKVM: Bool { TestSupport.hasKVM }

    public init() throws {
        var template = Array("/tmp/godwit-test-XXXXXX".utf8CString)
        // SAFETY: mkdtemp changes the six X of the terminated text in place.
        guard unsafe mkdtemp(&template) != nil else { throw TestObstacle("no folder under /tmp could be made") }
        folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    deinit {
        for child in children where child.poll() == nil { child.end(graceMilliseconds: 3000) }
        TemporaryFolder.removeAll(folder)
    }

    /// The folder of the sockets.
    public var runtime: String { "\(folder)/godwit" }

    /// The binary beside the test bundle.
    public static let binary: String = {
        var buffer = [UInt8](repeating: 0, count: 4096)
        // SAFETY: readlink fills at most the buffer's count and tells how much.
        let count = unsafe buffer.withUnsafeMutableBytes {
            unsafe readlink("/proc/self/exe", $0.baseAddress!.assumingMemoryBound(to: CChar.self), $0.count)
        }
        let path = String(decoding: buffer.prefix(max(0, count)), as: UTF8.self)
        return path.split(separator: "/").dropLast().reduce("") { $0 + "/" + $1 } + "/godwit"
    }()

    /// Runs `godwit` to its end. - Parameter through: a program and its arguments that start it.
    public func run(
        _ arguments: [String], input: String = "", through: [String] = [], seconds: UInt64 = 20
    ) throws -> Outcome {
        let child = try start(arguments, input: input, through: through)
        return finish(child, seconds: seconds)
    }

    /// Waits for the end of what `start` started.
    public func finish(_ child: (process: ChildProcess, stem: String), seconds: UInt64 = 20) -> Outcome {
        let status = child.process.wait(deadline: .after(seconds: seconds))
        if status == nil { child.process.end(graceMilliseconds: 100) }
        return Outcome(status: status, output: text(child.stem + ".out"), errors: text(child.stem + ".err"))
    }

    public func start(
        _ arguments: [String], input: String = "", through: [String] = []
    ) throws -> (process: ChildProcess, stem: String) {
        try start(command: through + [Self.binary] + arguments, input: input)
    }

    /// Starts any program, with its output in files of the folder.
    public func start(
        command: [String], input: String = ""
    ) throws -> (process: ChildProcess, stem: String) {
        counter += 1
        let stem = "\(folder)/\(counter)"
        try Descriptor.create(stem + ".in").writeAll(Array(input.utf8))
        let process = try ChildProcess(
            ["env", "XDG_RUNTIME_DIR=\(folder)", "TMPDIR=\(folder)"] + command,
            input: Descriptor.open(stem + ".in", O_RDONLY), output: Descriptor.create(stem + ".out"),
            error: Descriptor.create(stem + ".err"))
        children.append(process)
        return (process, stem)
    }

    /// Starts a VM and waits until it takes commands.
    public func startVM(_ name: String, _ options: [String]) throws -> VM {
        let child = try start(["run", "--name", name, "--die-with-parent", "--serial", "none"] + options)
        return try attach(name, to: child, monitor: "\(runtime)/\(name).qmp")
    }

    /// Waits until a VM's monitor answers at `path`.
    func attach(_ name: String, to child: (process: ChildProcess, stem: String), monitor path: String) throws -> VM {
        let deadline = Deadline.after(seconds: 20)
        while true {
            if let client = try? QMPClient(path: path) {
                return VM(name: name, process: child.process, stem: child.stem, client: client)
            }
            guard child.process.poll() == nil, !deadline.hasPassed else {
                throw TestObstacle("\(name) does not answer: \(finish(child, seconds: 0))")
            }
            Clock.sleep(nanoseconds: 5_000_000)
        }
    }

    private func text(_ path: String) -> String {
        String(decoding: (try? Descriptor.contents(of: path)) ?? [], as: UTF8.self)
    }
}
