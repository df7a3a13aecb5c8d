import CLinux
import Glibc
import Host

/// Standard output or standard error: whether people look at it, how wide it is, and writing all of a text to it.
public struct Terminal: Sendable {
    let descriptor: CInt

    /// For results.
    public static let output = Terminal(descriptor: 1)
    /// For progress and errors.
    public static let error = Terminal(descriptor: 2)

    public var isTerminal: Bool { isatty(descriptor) == 1 }

    /// Only on a terminal that can, and not where NO_COLOR (https://no-color.org) is set.
    public var showsColors: Bool {
        isTerminal && Self.variable("NO_COLOR", default: "").isEmpty && Self.variable("TERM", default: "dumb") != "dumb"
    }

    /// Columns of the terminal; 80 where that is not known.
    public var width: Int {
        // `struct winsize`: rows, columns, and both in pixels.
        var size: [UInt16] = [0, 0, 0, 0]
        // SAFETY: TIOCGWINSZ fills eight bytes, which is what the array holds.
        let status = unsafe size.withUnsafeMutableBytes { unsafe ioctl(descriptor, UInt(TIOCGWINSZ), $0.baseAddress!) }
        return status == 0 && size[1] > 0 ? Int(size[1]) : 80
    }

    /// Writes all of the text; a reader that went away is no error.
    public func write(_ text: String) {
        var rest = Array(text.utf8)[...]
        while !rest.isEmpty {
            // SAFETY: pointer and count are of the slice's own storage, alive during the call.
            let written = unsafe rest.withUnsafeBytes { unsafe Glibc.write(descriptor, $0.baseAddress, $0.count) }
            if written > 0 {
                rest = rest.dropFirst(written)
            } else if errno == EAGAIN {
                var wanted = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
                unsafe poll(&wanted, 1, -1)
            } else if errno != EINTR {
                return
            }
        }
    }

    private static func variable(_ name: String, default missing: String) -> String {
        // SAFETY: the string is copied before anything could change the environment.
        unsafe getenv(name).map { unsafe String(cString: $0) } ?? missing
    }
}
