import Glibc
import Host
import Testing

/// What a test does in a process of its own, because virtual machines and vCPUs last as long as their process.
public enum Child {
    /// Runs `body` and ends the process: with success if it comes back, else with a sentence on standard error.
    public static func run(seconds: UInt64, _ body: () throws -> Void) {
        _ = try? HostThread(name: "alarm") {
            Clock.sleep(nanoseconds: seconds * 1_000_000_000)
            fail("the test was not done after \(seconds) seconds")
        }
        do { try body() } catch { fail("\(error)") }
        TemporaryFolder.remove()
        _exit(0)
    }

    public static func fail(_ sentence: String) -> Never {
        Issue.record("\(sentence)")
        _ = try? Descriptor.standard(2, name: "standard error").writeAll(Array((sentence + "\n").utf8))
        TemporaryFolder.remove()
        _exit(1)
    }
}

/// Ends a child process with `sentence` unless `holds`.
public func claim(_ holds: Bool, _ sentence: @autoclosure () -> String) {
    if !holds { Child.fail(sentence()) }
}

/// Waits until `condition` holds; ends a child process that waits for too long.
public func waitFor(
    _ what: @autoclosure () -> String, seconds: UInt64 = 20, _ condition: () throws -> Bool
) throws {
    let deadline = Deadline.after(seconds: seconds)
    while try !condition() {
        if deadline.hasPassed { Child.fail("waited \(seconds) seconds for \(what())") }
        Clock.sleep(nanoseconds: 500_000)
    }
}
