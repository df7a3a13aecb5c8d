import CommandLineKit
import Host
import QMP

/// Who runs a measured guest.
enum MeasuredVMM: String, Sendable { case godwit, qemu }

/// A VM with a built-in guest that can be measured and checked, whoever runs it.
protocol MeasuredVM: AnyObject {
    var child: ChildVM { get }
    /// Whether the guest has filled its memory, and the pages it has touched since.
    func guest() throws -> (isReady: Bool, touches: UInt64)
    /// Checks every page of the guest, which stands still meanwhile. - Throws: `CommandFailure` with what is wrong.
    func verify() throws
}

/// What a measured VM is like.
struct MeasuredMachine: Sendable {
    var method: TrackingMethod
    var memoryMegabytes: UInt64
    var cpuCount = 1
    /// As `--guest` takes it.
    var guest: String
    var isDestination: Bool
    /// Take a destination's memory from the host beforehand: what a first touch costs here (up to 2 ms where an outer host has taken the
    /// memory back) has nothing to do with the method, and would drown the difference.
    var takesMemoryBeforehand = false
    /// A destination waits for its migration; else it is told to later, by `migrate-incoming`.
    var listensAtOnce = true
    /// Where the serial line listens; `nil`: there is none.
    var serialPath: String?

    var memoryBytes: UInt64 { memoryMegabytes << 20 }

    /// Starts it in a process of its own. - Parameter folder: for sockets and logs, which are named after the role.
    func start(_ role: String, in folder: String, by vmm: MeasuredVMM) throws -> any MeasuredVM {
        switch vmm {
        case .godwit: try GodwitVM(role, in: folder, self)
        case .qemu: try QEMUVM(role, in: folder, self)
        }
    }
}

extension BenchmarkOptions {
    /// Asks again and again until a guest has filled its memory. - Throws: `CommandFailure` if it has not in time.
    func waitUntilReady(
        _ what: String, seconds: UInt64 = 60, lookEveryMilliseconds pause: UInt64 = 20, _ isReady: () throws -> Bool
    ) throws {
        let deadline = Deadline.after(seconds: seconds)
        while try !isReady() {
            try checkInterruption()
            guard !deadline.hasPassed else {
                throw CommandFailure("\(what): the guest was not ready within \(seconds) s")
            }
            Clock.sleep(nanoseconds: pause * 1_000_000)
        }
    }
}

/// A `godwit run` of this program.
final class GodwitVM: MeasuredVM {
    let child: ChildVM

    /// - Parameter extra: options of `godwit run` besides.
    init(_ role: String, in folder: String, _ machine: MeasuredMachine, extra: [String] = []) throws {
        var options = [
            "--memory", "\(machine.memoryMegabytes)M", "--cpus", "\(machine.cpuCount)",
            "--serial", machine.serialPath.map { "unix:\($0)" } ?? "none",
            "--accel", machine.method.godwitAccelerator,
        ]
        options +=
            machine.isDestination
            ? ["--incoming", machine.listensAtOnce ? "tcp:127.0.0.1:0" : "defer"] : ["--guest", machine.guest]
        if machine.isDestination, machine.takesMemoryBeforehand { options.append("--memory-prealloc") }
        options += extra
        child = try ChildVM(role, in: folder, options: options)
    }

    func guest() throws -> (isReady: Bool, touches: UInt64) {
        let status = try child.execute("x-query-guest")
        return (status["ready"] == true, try child.touches(status))
    }

    func verify() throws {
        let result = try child.execute("x-check-guest", deadline: .after(seconds: 120))
        guard result["verified"] == true else {
            throw CommandFailure("\(child.role) VM: \(result["summary"]?.stringValue ?? "\(result)")")
        }
    }
}
